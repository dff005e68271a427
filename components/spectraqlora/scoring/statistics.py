"""Noise of a comparison on the same rows."""

from __future__ import annotations

import math


def difference_stderr(first: list[float], second: list[float], tokens: list[int]) -> float:
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
