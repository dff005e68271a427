"""A promotion, and a rollback, that are stopped at any of their requests: the retry completes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from spectraqlora.settings import EvaluateSettings, PromoteSettings
from spectraqlora.steps.promote.promotion import Outcome, Promotion, rollback
from spectraqlora.tracking.ledger import Ledger
from spectraqlora.tracking.registry import CHAMPION, PREVIOUS, Registry

from tests.registered import register, registry
from tests.stopped import run_until_request

pytestmark = pytest.mark.e2e
Work = Callable[[Registry], Outcome]


def promote(models: Registry) -> Outcome:
    return Promotion(models, models.version("challenger"), PromoteSettings(), EvaluateSettings()).run()


def force(models: Registry) -> Outcome:
    challenger = models.version("challenger")
    return Promotion(models, challenger, PromoteSettings(), EvaluateSettings()).run(force="by hand")


def roll_back(models: Registry) -> Outcome:
    return rollback(models, "slow")


def open_registry(folder: Path) -> Registry:
    return registry(f"sqlite:///{folder}/mlflow.db", "stopped")


@pytest.fixture(scope="module")
def three_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 and 2 were champion, one after the other; 3 is the challenger, and better."""
    folder = tmp_path_factory.mktemp("registry")

    def write() -> None:
        models = open_registry(folder)
        for loss in (3.0, 2.0, 1.0):
            register(models, loss=loss, accuracy=1 / loss)
            if loss > 1:
                promote(models)

    assert run_until_request(write)
    return folder


def state(
    folder: Path,
) -> tuple[dict[str, int], list[tuple[int, int | None, str, str]], list[dict[str, str]]]:
    """Aliases, ledger, and every version's tags without their times."""
    models = open_registry(folder)
    versions = models.versions()
    return (
        {alias: version.number for version in versions for alias in version.aliases},
        [(e.version, e.before, e.kind, e.reason) for e in Ledger(models).entries()],
        [{k: v for k, v in version.tags.items() if k != "promotion.at"} for version in versions],
    )


@pytest.mark.parametrize(
    ("work", "champion", "before", "decision", "stride"),
    [(promote, 3, 2, "promoted", 1), (force, 3, 2, "forced", 5), (roll_back, 1, None, "rolled back", 1)],
)
def test_a_stop_at_any_request_and_a_retry_leave_what_one_that_nobody_stopped_leaves(
    work: Work,
    champion: int,
    before: int | None,
    decision: str,
    stride: int,
    three_versions: Path,
    tmp_path: Path,
) -> None:
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(three_versions, undisturbed)
    assert run_until_request(lambda: work(open_registry(undisturbed)))
    expected = state(undisturbed)
    assert expected[0][CHAMPION] == champion and expected[0].get(PREVIOUS) == before
    assert expected[1][-1][:3] == (champion, 2, decision)

    request, finished, completed = 1 - stride, False, 0
    while not finished:
        request += stride
        folder = tmp_path / str(request)
        shutil.copytree(three_versions, folder)
        finished = run_until_request(lambda folder=folder: work(open_registry(folder)), request)  # type: ignore[misc]
        if state(folder) != expected:
            assert not finished
            outcome = work(open_registry(folder))
            assert (outcome.version, outcome.decision, outcome.against) == (champion, decision, 2), request
            assert state(folder) == expected, f"stopped after request {request}"
            completed += 1
    print(f"{decision}: stopped at requests up to {request - 1}, {stride} apart")
    assert completed > 25 / stride


def test_a_stopped_promotion_that_another_one_replaced_keeps_its_record(
    three_versions: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(three_versions, folder)
    models = open_registry(folder)
    third = models.version("challenger").number
    assert Ledger(models)._append(3, third, 2, "promoted", "stopped here")
    best = register(models, loss=0.5)
    assert promote(models).against == third
    late = Promotion(models, models.version(third), PromoteSettings(), EvaluateSettings()).run()
    assert (late.decision, late.reason, late.against) == ("promoted", "stopped here", 2)
    assert models.version(third).tags["promotion.decision"] == "promoted"
    assert models.by_alias(CHAMPION) == models.version(best)
