"""The re-evaluate step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.artifacts import RankMap
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import EvaluateSettings, SelectSettings, SnrSettings, TrackingSettings


@step
def run(
    *,
    run_key: str,
    evaluate_settings: dict[str, Any],
    select_settings: dict[str, Any],
    snr_settings: dict[str, Any],
    tracking_settings: dict[str, Any],
    seed: int,
    four_bit: Any,
    rows: Any,
    rank_map: Any,
    adapter: Any,
    previous: Any,
    evaluation: Any,
    next_rank_map: Any,
    next_adapter: Any,
) -> None:
    from spectraqlora.steps.re_evaluate.evaluate import re_evaluate
    from spectraqlora.tracking.runs import Tracker

    tracker = Tracker(TrackingSettings(**tracking_settings), run_key, "re-evaluate")
    branch = tracker.branch_run(RankMap.read(rank_map.path).method)
    select, snr = SelectSettings(**select_settings), SnrSettings(**snr_settings)
    folder = output_folder(evaluation)
    result = re_evaluate(
        Path(four_bit.path),
        Path(rows.path),
        Path(rank_map.path),
        Path(adapter.path),
        EvaluateSettings(**evaluate_settings),
        select,
        snr,
        seed,
        folder,
        output_folder(next_rank_map),
        output_folder(next_adapter),
        previous=Path(previous.path) if previous is not None else None,
    )
    metrics = result.headline()
    for name, value in metrics.items():
        evaluation.log_metric(name, value)
    chosen = {"select": select.model_dump(), "snr": snr.model_dump()}

    def send() -> None:
        tracker.log_params(branch, chosen)
        tracker.log_evaluation(branch, result, metrics)
        tracker.log_folder(branch, folder, "evaluation")
        tracker.finish(branch)

    tracker.retry_while_away(send, "the evaluation")
