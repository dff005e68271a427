"""Noise of a comparison on the same rows, and the one test that says whether a difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIGNIFICANCE = 0.05
"""Two models whose paired test gives a p-value of at least this are tied."""


def difference_stderr(first: Sequence[float], second: Sequence[float], tokens: Sequence[int]) -> float:
    """Standard error of the difference of two mean losses per token on the same rows.

    Args:
        first: summed loss of every row, nats.
        second: of the other model, same rows.
        tokens: counted tokens of every row.
    """
    total = sum(tokens)
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(gaps) / total
    squares = sum((gap - mean * n) ** 2 for gap, n in zip(gaps, tokens, strict=True))
    return math.sqrt(squares * len(gaps) / max(len(gaps) - 1, 1)) / total


@dataclass(frozen=True)
class PairedTest:
    """A model against another one on the same rows."""

    difference: float
    """Mean loss per token minus the other's, nats; above zero where this one is worse."""
    stderr: float
    """Of the difference, over rows."""
    p_value: float
    """How often a difference of at least this size would come from rows alone: two-sided, Student's t."""

    @property
    def tied(self) -> bool:
        """Whether the difference is no more than noise."""
        return self.p_value >= SIGNIFICANCE


def paired_test(first: Sequence[float], second: Sequence[float], tokens: Sequence[int]) -> PairedTest:
    """Student's paired t-test of two models' losses on the same rows; one row says nothing, and ties.

    Args:
        first: summed loss of every row, nats.
        second: of the other model, same rows.
        tokens: counted tokens of every row.
    """
    difference = (sum(first) - sum(second)) / sum(tokens)
    stderr = difference_stderr(first, second, tokens)
    if len(tokens) < 2 or difference == 0:
        return PairedTest(difference, stderr, 1.0)
    if stderr == 0:
        return PairedTest(difference, stderr, 0.0)
    return PairedTest(difference, stderr, two_sided_p(difference / stderr, len(tokens) - 1))


def two_sided_p(t: float, freedom: int) -> float:
    """How often |T| is at least |t|, for Student's t with a whole number of degrees of freedom, from 1.

    Source: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    series = 0.0
    for power in range(odd, freedom - 1, 2):
        series += term
        term *= cosine**2 * (power + 1) / (power + 2)
    inside = 2 / math.pi * (angle + sine * series) if odd else sine * series
    return min(max(1.0 - inside, 0.0), 1.0)
