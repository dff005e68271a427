"""The re-evaluate step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.artifacts import RankMap
from spectraqlora.runtime.run_key import run_key
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import EvaluateSettings, SelectSettings, SnrSettings, TrackingSettings


@step
def run(
    *,
    round: int,
    rounds: int,
    evaluate_settings: dict[str, Any],
    select_settings: dict[str, Any],
    snr_settings: dict[str, Any],
    tracking_settings: dict[str, Any],
    seed: int,
    four_bit: Any,
    rows: Any,
    rank_map: Any,
    adapter: Any,
    table: Any,
    measurement: Any,
    previous: Any,
    evaluation: Any,
    next_rank_map: Any,
    next_adapter: Any,
) -> None:
    from spectraqlora.steps.re_evaluate.evaluate import Inputs, Outputs, Sections, re_evaluate
    from spectraqlora.tracking.runs import Tracker

    inputs = Inputs(
        four_bit=Path(four_bit.path),
        rows=Path(rows.path),
        rank_map=Path(rank_map.path),
        adapter=Path(adapter.path),
        table=Path(table.path),
        measurement=Path(measurement.path),
        previous=Path(previous.path) if previous is not None else None,
    )
    sections = Sections(
        evaluate=EvaluateSettings(**evaluate_settings),
        select=SelectSettings(**select_settings),
        snr=SnrSettings(**snr_settings),
    )
    tracker = Tracker(TrackingSettings(**tracking_settings), run_key(), "re-evaluate")
    branch = tracker.branch_run(RankMap.read(inputs.rank_map).method)
    outputs = Outputs(
        evaluation=output_folder(evaluation),
        next_rank_map=output_folder(next_rank_map),
        next_adapter=output_folder(next_adapter),
    )
    result = re_evaluate(inputs, outputs, sections, round, rounds, seed)
    metrics = result.headline()
    for name, value in metrics.items():
        evaluation.log_metric(name, value)
    chosen = {"select": sections.select.model_dump(), "snr": sections.snr.model_dump()}

    def send() -> None:
        tracker.log_params(branch, chosen)
        tracker.log_evaluation(branch, result, metrics)
        tracker.log_folder(branch, outputs.evaluation, "evaluation")
        tracker.finish(branch)

    tracker.retry_while_away(send, "the evaluation")
