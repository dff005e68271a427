"""Plain text in full sequences instead of padded ones."""

from __future__ import annotations


def packed(rows: list[list[int]], length: int) -> list[list[int]]:
    """All tokens of all rows in turn, cut into sequences of `length` tokens.

    A short rest is kept only where it is all there is.
    """
    ids = [token for row in rows for token in row]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)] or [ids]
