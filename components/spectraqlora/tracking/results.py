"""A run's results sent to MLflow from compare's leaderboard alone.

Whatever train, re-evaluate and compare send while they work is in it too: a step that is taken from a cache sends
nothing, and one whose server was away could not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import Evaluation, PreparedRows
from spectraqlora.tracking.runs import Tracker

WINNER = "winner"
"""Tag of a pipeline's run: the method that won; it is there when all results are."""


def log_results(tracker: Tracker, leaderboard: Path, rows: Path) -> None:
    """Send every branch's parameters, data, curves, numbers and files, and the leaderboard; what is there stays.

    Args:
        tracker: of the pipeline run.
        leaderboard: compare's artifact.
        rows: the prepared rows.

    Raises:
        ServerAway: MLflow does not answer.
    """
    run = tracker.pipeline_run()
    document = json.loads((leaderboard / "leaderboard.json").read_text(encoding="utf-8"))
    prepared = PreparedRows.read(rows)
    losses = {}
    for method in document["order"]:
        evaluation = Evaluation.read(leaderboard / method)
        branch = tracker.branch_run(method)
        tracker.log_params(branch, _parameters(evaluation))
        tracker.log_data(branch, prepared)
        tracker.log_evaluation(branch, evaluation, evaluation.headline())
        if not tracker.has_files(branch, "evaluation"):
            _log_rank_maps(tracker, branch, evaluation)
            tracker.log_folder(branch, leaderboard / method, "evaluation")
        tracker.finish(branch)
        losses[f"{method}_eval_loss"] = evaluation.eval_loss
    tracker.log_metrics(run, losses)
    tracker.log_file(run, leaderboard / "leaderboard.json")
    for name in ("plots", "snr"):
        tracker.log_folder(run, leaderboard / name, name)
    tracker.set_tags(run, {WINNER: document["winner"]})


def results_logged(tracker: Tracker) -> bool:
    """Whether `log_results` came to its end for this pipeline run."""
    return WINNER in tracker.tags(tracker.pipeline_run())


def _parameters(evaluation: Evaluation) -> dict[str, Any]:
    """What train and re-evaluate log of a branch before they work."""
    log = evaluation.rounds[-1].training
    known = {"method": evaluation.method, "seed": log.seed, "train": log.settings, **evaluation.settings}
    return {name: value for name, value in known.items() if value is not None}


def _log_rank_maps(tracker: Tracker, branch: str, evaluation: Evaluation) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for result in evaluation.rounds:
            folder = Path(scratch) / f"round-{result.round}"
            result.rank_map.write(folder)
            tracker.log_folder(branch, folder, folder.name)
