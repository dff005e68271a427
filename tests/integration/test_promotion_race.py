"""Promotions in several processes at once, against a real MLflow server."""

from __future__ import annotations

import itertools
import multiprocessing
from typing import Any

import pytest
from spectraqlora.settings import EvaluateSettings, PromoteSettings
from spectraqlora.steps.promote.promotion import Outcome, Promotion
from spectraqlora.tracking.ledger import Ledger
from spectraqlora.tracking.registry import CHAMPION, PREVIOUS

from tests.mlflow_server import MlflowServer
from tests.registered import register, registry

pytestmark = pytest.mark.e2e
LOSSES = (1.8, 1.2, 1.6, 1.4)


def _promote(uri: str, name: str, version: int, barrier: Any, outcomes: Any) -> None:
    class Together(Promotion):
        """All decide against the same champion before the first of them acts."""

        met = False

        def _outcome(self, champion: Any, force: str) -> Outcome:
            if not self.met:
                self.met = True
                barrier.wait(timeout=240)
            return super()._outcome(champion, force)

    models = registry(uri, name)
    promotion = Together(models, models.version(version), PromoteSettings(), EvaluateSettings())
    outcomes.put(promotion.run())


def test_promotions_at_once_leave_one_champion_the_best_one(mlflow_server: MlflowServer) -> None:
    models = registry(mlflow_server.uri, "raced")
    first = register(models, loss=2.0)
    Promotion(models, models.version(first), PromoteSettings(), EvaluateSettings()).run()
    losses = {register(models, loss=loss): loss for loss in LOSSES}
    context = multiprocessing.get_context("spawn")
    barrier, outcomes = context.Barrier(len(losses)), context.Queue()
    promoting = [
        context.Process(target=_promote, args=(mlflow_server.uri, "raced", version, barrier, outcomes))
        for version in losses
    ]
    for process in promoting:
        process.start()
    results = [outcomes.get(timeout=300) for _ in promoting]
    for process in promoting:
        process.join()

    best = min(losses, key=lambda version: losses[version])
    history = Ledger(models).entries()
    assert history[-1].version == best
    losses[first] = 2.0
    for before, after in itertools.pairwise(history):
        assert after.before == before.version, "each replaced the one that really was champion"
        assert losses[after.version] < losses[before.version], "each was better than that one"
    aliases = {alias: v.number for v in models.versions() for alias in v.aliases}
    assert aliases[CHAMPION] == best and aliases[PREVIOUS] == history[-1].before
    promoted = {outcome.version for outcome in results if outcome.promoted}
    assert promoted == {entry.version for entry in history[1:]}
    for outcome in results:
        assert outcome.version in promoted or losses[outcome.against] <= losses[outcome.version]
        assert models.version(outcome.version).tags["promotion.decision"] == outcome.decision
