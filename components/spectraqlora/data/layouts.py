"""Row layouts: which columns a data set has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from spectraqlora.errors import InputError

Layout = Literal["chat", "prompt-completion", "question-answer", "alpaca", "text"]
COLUMNS: dict[Layout, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""What a layout needs; prompt before completion. More columns do no harm."""


def recognise(columns: Iterable[str]) -> Layout:
    """The first layout whose columns are all there.

    Raises:
        InputError: the columns fit none.
    """
    names = list(columns)
    for layout, required in COLUMNS.items():
        if set(required) <= set(names):
            return layout
    known = "; ".join(f"{name} ({', '.join(required)})" for name, required in COLUMNS.items())
    raise InputError("data columns", ", ".join(names), f"a known layout: {known}")
