"""The compare step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import Evaluation
from spectraqlora.files import write_text
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import TrackingSettings


@step
def run(
    *,
    run_key: str,
    tracking_settings: dict[str, Any],
    table: Any,
    evaluations: list[Any],
    adapters: list[Any],
    leaderboard: Any,
    winner: Any,
) -> None:
    from spectraqlora.report import plots
    from spectraqlora.snr.table import read_table
    from spectraqlora.steps.compare.leaderboard import rank
    from spectraqlora.steps.compare.leaderboard import winner as choose
    from spectraqlora.tracking.runs import Tracker

    tracker = Tracker(TrackingSettings(**tracking_settings), run_key, "compare")
    run = tracker.pipeline_run()

    found = {
        (e := Evaluation.read(evaluation.path)).method: (e, adapter)
        for evaluation, adapter in zip(evaluations, adapters, strict=True)
        if evaluation is not None
    }
    ordered = rank([evaluation for evaluation, _ in found.values()])
    best = choose(ordered)
    board, chosen = output_folder(leaderboard), output_folder(winner)
    write_text(
        board / "leaderboard.json",
        json.dumps({"winner": best, "order": [e.method for e in ordered]}, indent=1),
    )
    for entry in ordered:
        leaderboard.log_metric(f"{entry.method}_eval_loss", entry.eval_loss)
        entry.write(board / entry.method)
    shutil.copytree(found[best][1].path, chosen / "adapter")
    found[best][0].write(chosen)
    winner.metadata["method"] = best

    def send() -> None:
        # What an earlier step could not send while the server was away goes with it.
        for entry in ordered:
            branch = tracker.branch_run(entry.method)
            tracker.log_evaluation(branch, entry, entry.headline())
            tracker.finish(branch)
        tracker.log_metrics(run, {f"{e.method}_eval_loss": e.eval_loss for e in ordered})
        tracker.set_tags(run, {"winner": best})
        tracker.log_file(run, board / "leaderboard.json")
        tracker.log_folder(run, board / "plots", "plots")
        for name in ("snr.parquet", "heatmap.png"):
            tracker.log_file(run, Path(table.path) / name, "snr")

    plots.write_plots(plots.draw(ordered, read_table(Path(table.path)), best), board / "plots")
    tracker.retry_while_away(send, "the leaderboard")
