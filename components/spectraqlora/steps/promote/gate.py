"""The gate: whether a challenger becomes champion, from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from spectraqlora.errors import InputError
from spectraqlora.settings import HIGHER_IS_BETTER, PromoteSettings
from spectraqlora.tracking.registry import COMPLETING_TAG, TEST_LOSS


@dataclass(frozen=True)
class Decision:
    """What the gate says and why, with the numbers that it compared."""

    promote: bool
    reason: str
    challenger: Mapping[str, float]
    champion: Mapping[str, float] = field(default_factory=dict)


def with_metric(settings: PromoteSettings, challenger: Mapping[str, float]) -> PromoteSettings:
    """The settings with what `promote.metric=auto` stands for: the loss of the test rows, where there are any."""
    if settings.metric != "auto":
        return settings
    metric = TEST_LOSS if TEST_LOSS in challenger else COMPLETING_TAG
    return settings.model_copy(update={"metric": metric})


def decide(
    challenger: Mapping[str, float], champion: Mapping[str, float] | None, settings: PromoteSettings
) -> Decision:
    """The challenger wins when its metric is better by more than the margin and no guard got worse than allowed.

    Args:
        challenger: its metrics, measured on the same rows as the champion's.
        champion: the champion's; None where there is no champion yet.
        settings: metric, margin and guards.

    Raises:
        InputError: a metric that one of them does not have.
    """
    settings = with_metric(settings, challenger)
    names = [settings.metric, *settings.bounds]
    _all_there("challenger", challenger, names)
    numbers = {name: challenger[name] for name in names}
    for name, value in numbers.items():
        if not math.isfinite(value):
            return Decision(False, f"{name} of the challenger is {value}", numbers)
    if champion is None:
        return Decision(True, "there was no champion", numbers)
    _all_there("champion", champion, names)
    before = {name: champion[name] for name in names}
    gain = _worse(settings.metric, before[settings.metric], numbers[settings.metric], -1)
    compared = f"{settings.metric} {numbers[settings.metric]:.6g} against {before[settings.metric]:.6g}"
    if not math.isfinite(before[settings.metric]):
        gain = math.inf
    if not gain > settings.margin:
        return Decision(False, f"{compared}: not better by more than {settings.margin:g}", numbers, before)
    for name, bound in settings.bounds.items():
        loss = _worse(name, before[name], numbers[name], 1)
        if loss > bound * abs(before[name]):
            return Decision(
                False,
                f"{name} {numbers[name]:.6g} against {before[name]:.6g}: worse by more than {bound:.3g} of it",
                numbers,
                before,
            )
    return Decision(True, f"{compared}: better by more than {settings.margin:g}", numbers, before)


def _worse(name: str, before: float, now: float, sign: int) -> float:
    """How much worse (sign 1) or better (sign -1) a metric became."""
    direction = -1 if name in HIGHER_IS_BETTER else 1
    return sign * direction * (now - before)


def _all_there(whose: str, metrics: Mapping[str, float], names: list[str]) -> None:
    for place, name in enumerate(names):
        if name not in metrics:
            known = ", ".join(sorted(metrics)) or "it has none"
            key = "promote.metric" if place == 0 else "promote.guards"
            raise InputError(key, name, f"a metric that the {whose} has: {known}")
