"""The train step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.run_key import run_key
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import CheckpointSettings, EvaluateSettings, TrackingSettings, TrainSettings


@step
def run(
    *,
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
    from spectraqlora.models.optimizers import check_optimizer
    from spectraqlora.steps.train import distributed, launch
    from spectraqlora.steps.train.request import Inputs, TrainRequest
    from spectraqlora.steps.train.tracked import train_tracked

    # KFP hands every number over as a float; the sections give them their types back.
    request = TrainRequest(
        inputs=Inputs(
            four_bit=Path(four_bit.path),
            rows=Path(rows.path),
            rank_map=Path(rank_map.path),
            start=_start(previous, start),
        ),
        output=Path(adapter.path),
        seed=seed,
        rounds=rounds,
        train=TrainSettings(**train_settings),
        evaluate=EvaluateSettings(**evaluate_settings),
        checkpoint=CheckpointSettings(**checkpoint_settings),
        tracking=TrackingSettings(**tracking_settings),
        run_key=run_key(),
    )
    if request.train.nodes > 1:
        from spectraqlora.steps.train.on_nodes import train_on_nodes

        output_folder(adapter)
        train_on_nodes(request)
        return
    check_optimizer(request.train.optimizer)
    processes = distributed.process_count(request.train)
    distributed.split_batch(request.train, processes)
    if distributed.is_main():
        output_folder(adapter)
    if processes > 1 and not launch.launched():
        launch.launch(processes, request)
    else:
        train_tracked(request)


def _start(previous: Any, start: Any) -> Path | None:
    """The adapter of the round before, else the one given to start from; one without weights is none."""
    from spectraqlora.models.adapters import WEIGHTS

    if previous is not None:
        return Path(previous.path)
    return Path(start.path) if start is not None and (Path(start.path) / WEIGHTS).exists() else None
