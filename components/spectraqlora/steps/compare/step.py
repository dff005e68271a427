"""The compare step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.run_key import run_key
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import TrackingSettings


@step
def run(
    *,
    tracking_settings: dict[str, Any],
    outline: Any,
    rows: Any,
    table: Any,
    branches: dict[str, tuple[Any, Any]],
    leaderboard: Any,
    winner: Any,
    report: Any,
) -> None:
    from spectraqlora.steps.compare.comparison import Inputs, compare
    from spectraqlora.tracking.results import log_results
    from spectraqlora.tracking.runs import Tracker

    tracker = Tracker(TrackingSettings(**tracking_settings), run_key(), "compare")
    tracker.pipeline_run()
    given = {method: pair for method, pair in branches.items() if pair[0] is not None}
    inputs = Inputs(
        outline=Path(outline.path),
        rows=Path(rows.path),
        table=Path(table.path),
        evaluations={method: Path(evaluation.path) for method, (evaluation, _) in given.items()},
        adapters={
            method: Path(adapter.path) for method, (_, adapter) in given.items() if adapter is not None
        },
    )
    board = output_folder(leaderboard)
    result = compare(inputs, board, output_folder(winner), Path(report.path))
    for entry in result.best_first:
        leaderboard.log_metric(f"{entry.method}_eval_loss", entry.eval_loss)
    winner.metadata["method"] = result.winner
    tracker.retry_while_away(lambda: log_results(tracker, board, inputs.rows), "the leaderboard")
