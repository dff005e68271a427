"""Which optimizer steps of its branch a round trains, and with which learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spectraqlora.artifacts import RankMap
from spectraqlora.methods.catalogue import method
from spectraqlora.settings import TrainSettings


@dataclass(frozen=True)
class Span:
    """The optimizer steps of one round, from `start` to before `stop`, of the branch's `total`."""

    start: int
    stop: int
    total: int

    @property
    def steps(self) -> int:
        """How many the round trains."""
        return self.stop - self.start


def span(rank_map: RankMap, max_steps: int, rounds: int) -> Span:
    """A round's steps: all at once where the rank map never moves, else its share of one schedule.

    The learning-rate schedule and the reading order run over the whole branch, so that branches differ in
    what they train and in nothing else.
    """
    total = max_steps * rounds
    if not method(rank_map.method).moves:
        return Span(0, total, total)
    return Span((rank_map.round - 1) * max_steps, rank_map.round * max_steps, total)


def learning_rates(optimizer: torch.optim.Optimizer, settings: TrainSettings, span: Span) -> Any:
    """The branch's learning-rate schedule for an optimizer, from the round's first step on."""
    from transformers import get_scheduler

    warmup = int(span.total * settings.warmup_ratio)
    factor = get_scheduler(settings.schedule, optimizer, warmup, span.total).lr_lambdas[0]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step + span.start))
