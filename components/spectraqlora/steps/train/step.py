"""The train step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import PreparedData, RankMap, TrainingLog
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import CheckpointSettings, EvaluateSettings, TrackingSettings, TrainSettings


@step
def run(
    run_key: str,
    rounds: int,
    settings: dict[str, Any],
    evaluate: dict[str, Any],
    tracking: dict[str, Any],
    seed: int,
    quantized: Any,
    data: Any,
    ranks: Any,
    adapter: Any,
    previous: Any,
    checkpoint: dict[str, Any],
    start: Any = None,
) -> None:
    arguments = dict(locals())
    from spectraqlora.steps.train import distributed
    from spectraqlora.steps.train.training import check_optimizer, nothing_left, train
    from spectraqlora.tracking.live import LiveMetrics
    from spectraqlora.tracking.runs import Tracker

    # KFP hands every number over as a float; the sections give them their types back.
    section, scoring = TrainSettings(**settings), EvaluateSettings(**evaluate)
    rank_map = RankMap.read(ranks.path)
    check_optimizer(section)
    count = distributed.processes(section)
    distributed.share(section, count)
    begin = start.path if start is not None and any(Path(start.path).iterdir()) else None
    if count > 1 and not distributed.launched() and not nothing_left(rank_map):
        distributed.launch(count, arguments)
        return
    work = functools.partial(
        train,
        Path(quantized.path),
        Path(data.path),
        Path(ranks.path),
        section,
        scoring,
        seed,
        rounds,
        previous=Path(previous.path) if previous is not None else None,
        start=Path(begin) if begin is not None else None,
        checkpoint=CheckpointSettings(**checkpoint),
    )
    if not distributed.is_main():
        work(output=Path(adapter.path))
        return
    tracker = Tracker(TrackingSettings(**tracking), run_key, "train")
    branch = tracker.branch_run(rank_map.method)
    tracker.log_params(
        branch,
        {
            "method": rank_map.method,
            "seed": seed,
            "train": section.model_dump(),
            "evaluate": scoring.model_dump(),
        },
    )
    tracker.log_data(branch, PreparedData.read(data.path))
    with LiveMetrics(tracker, branch, (rank_map.round - 1) * section.max_steps) as live:
        log: TrainingLog = work(output=output_folder(adapter), on_metric=live)

    def send() -> None:
        tracker.log_training(branch, log, section.max_steps)
        tracker.log_file(branch, Path(ranks.path) / RankMap.filename(), f"round-{log.round}")

    tracker.patiently(send, "what training logged")
