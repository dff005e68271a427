"""The train step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import PreparedRows, RankMap, TrainingLog
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import CheckpointSettings, EvaluateSettings, TrackingSettings, TrainSettings

ADAPTER = "adapter_model.safetensors"
"""PEFT's name of an adapter's weights; where training starts from the base there is none."""


@step
def run(
    *,
    run_key: str,
    rounds: int,
    train_settings: dict[str, Any],
    evaluate_settings: dict[str, Any],
    tracking_settings: dict[str, Any],
    checkpoint_settings: dict[str, Any],
    seed: int,
    four_bit: Any,
    rows: Any,
    rank_map: Any,
    adapter: Any,
    previous: Any = None,
    start: Any = None,
) -> None:
    arguments = dict(locals())
    from spectraqlora.models.optimizers import check_optimizer
    from spectraqlora.steps.train import distributed
    from spectraqlora.steps.train.training import nothing_left, train
    from spectraqlora.tracking.live import LiveMetrics
    from spectraqlora.tracking.runs import Tracker

    # KFP hands every number over as a float; the sections give them their types back.
    section, scoring = TrainSettings(**train_settings), EvaluateSettings(**evaluate_settings)
    ranks = RankMap.read(rank_map.path)
    check_optimizer(section.optimizer)
    count = distributed.processes(section)
    distributed.share(section, count)
    begin = start.path if start is not None and (Path(start.path) / ADAPTER).exists() else None
    if count > 1 and not distributed.launched() and not nothing_left(ranks):
        distributed.launch(count, arguments)
        return
    work = functools.partial(
        train,
        Path(four_bit.path),
        Path(rows.path),
        Path(rank_map.path),
        section,
        scoring,
        seed,
        rounds,
        previous=Path(previous.path) if previous is not None else None,
        start=Path(begin) if begin is not None else None,
        checkpoint=CheckpointSettings(**checkpoint_settings),
    )
    if not distributed.is_main():
        work(output=Path(adapter.path))
        return
    tracker = Tracker(TrackingSettings(**tracking_settings), run_key, "train")
    branch = tracker.branch_run(ranks.method)
    tracker.log_params(
        branch,
        {
            "method": ranks.method,
            "seed": seed,
            "train": section.model_dump(),
            "evaluate": scoring.model_dump(),
        },
    )
    tracker.log_data(branch, PreparedRows.read(rows.path))
    with LiveMetrics(tracker, branch, (ranks.round - 1) * section.max_steps) as live:
        log: TrainingLog = work(output=output_folder(adapter), on_metric=live)

    def send() -> None:
        tracker.log_training(branch, log, section.max_steps)
        tracker.log_file(branch, Path(rank_map.path) / RankMap.filename(), f"round-{log.round}")

    tracker.retry_while_away(send, "what training logged")
