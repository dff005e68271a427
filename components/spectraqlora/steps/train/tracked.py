"""A training followed by MLflow: parameters and data before it, curves during it, its log after it."""

from __future__ import annotations

from spectraqlora.artifacts import PreparedRows, RankMap, TrainingLog
from spectraqlora.steps.train import distributed
from spectraqlora.steps.train.checkpoints import identity
from spectraqlora.steps.train.request import TrainRequest
from spectraqlora.steps.train.training import train
from spectraqlora.tracking.live import LiveMetrics
from spectraqlora.tracking.needs import CHECKPOINTS
from spectraqlora.tracking.runs import Tracker


def train_tracked(request: TrainRequest) -> TrainingLog:
    """Train, alone or as one of several processes, of which the first one reports.

    Raises:
        InputError: unusable inputs, or a tracking server that does not answer at the start.
        Stopped: by SIGTERM or SIGINT, after a checkpoint.
    """
    if not distributed.is_main():
        return train(request)
    rank_map = RankMap.read(request.inputs.rank_map)
    tracker = Tracker(request.tracking, request.run_key, "train")
    branch = tracker.branch_run(rank_map.method)
    tracker.log_params(
        branch,
        {
            "method": rank_map.method,
            "seed": request.seed,
            "train": request.train.model_dump(),
            "evaluate": request.evaluate.model_dump(),
        },
    )
    tracker.log_data(branch, PreparedRows.read(request.inputs.rows))
    tracker.set_tags(branch, {f"{CHECKPOINTS}{identity(request)}": f"round {rank_map.round}"})
    with LiveMetrics(tracker, branch, (rank_map.round - 1) * request.train.max_steps) as live:
        log = train(request, on_metric=live)

    def send() -> None:
        tracker.log_training(branch, log, request.train.max_steps)
        tracker.log_file(branch, request.inputs.rank_map / RankMap.filename(), f"round-{log.round}")

    tracker.retry_while_away(send, "what training logged")
    return log
