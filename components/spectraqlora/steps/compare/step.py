"""The compare step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import TrackingSettings


@step
def run(
    *,
    run_key: str,
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
    from spectraqlora.tracking.runs import Tracker

    tracker = Tracker(TrackingSettings(**tracking_settings), run_key, "compare")
    pipeline_run = tracker.pipeline_run()
    given = {method: pair for method, pair in branches.items() if pair[0] is not None}
    inputs = Inputs(
        Path(outline.path),
        Path(rows.path),
        Path(table.path),
        evaluations={method: Path(evaluation.path) for method, (evaluation, _) in given.items()},
        adapters={
            method: Path(adapter.path) for method, (_, adapter) in given.items() if adapter is not None
        },
    )
    board = output_folder(leaderboard)
    result = compare(inputs, board, output_folder(winner), Path(report.path))
    losses = {f"{entry.method}_eval_loss": entry.eval_loss for entry in result.best_first}
    for name, loss in losses.items():
        leaderboard.log_metric(name, loss)
    winner.metadata["method"] = result.winner

    def send() -> None:
        # What an earlier step could not send while the server was away goes with it.
        for entry in result.best_first:
            branch = tracker.branch_run(entry.method)
            tracker.log_evaluation(branch, entry, entry.headline())
            tracker.finish(branch)
        tracker.log_metrics(pipeline_run, losses)
        tracker.set_tags(pipeline_run, {"winner": result.winner})
        tracker.log_file(pipeline_run, board / "leaderboard.json")
        tracker.log_folder(pipeline_run, board / "plots", "plots")
        for name in ("snr.parquet", "heatmap.png"):
            tracker.log_file(pipeline_run, inputs.table / name, "snr")

    tracker.retry_while_away(send, "the leaderboard")
