"""The re-evaluate step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.artifacts import RankMap
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import EvaluateSettings, SelectSettings, SnrSettings, TrackingSettings


@step
def run(
    run_key: str,
    sections: tuple[dict[str, Any], ...],
    seed: int,
    inputs: tuple[Any, ...],
    outputs: tuple[Any, Any, Any],
) -> None:
    from spectraqlora.steps.re_evaluate.evaluate import re_evaluate
    from spectraqlora.tracking.runs import Tracker

    settings, select, snr, tracking = sections
    quantized, data, ranks, adapter, previous = inputs
    evaluation = outputs[0]
    tracker = Tracker(TrackingSettings(**tracking), run_key, "re-evaluate")
    branch = tracker.branch_run(RankMap.read(ranks.path).method)
    folders = [output_folder(artifact) for artifact in outputs]
    result = re_evaluate(
        Path(quantized.path),
        Path(data.path),
        Path(ranks.path),
        Path(adapter.path),
        EvaluateSettings(**settings),
        SelectSettings(**select),
        SnrSettings(**snr),
        seed,
        folders[0],
        folders[1],
        folders[2],
        previous=Path(previous.path) if previous is not None else None,
    )
    metrics = result.headline()
    for name, value in metrics.items():
        evaluation.log_metric(name, value)
    chosen = {"select": SelectSettings(**select).model_dump(), "snr": SnrSettings(**snr).model_dump()}

    def send() -> None:
        tracker.log_params(branch, chosen)
        tracker.log_evaluation(branch, result, metrics)
        tracker.log_folder(branch, folders[0], "evaluation")
        tracker.finish(branch)

    tracker.patiently(send, "the evaluation")
