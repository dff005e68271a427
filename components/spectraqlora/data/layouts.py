"""Row layouts: which columns a data set has, and what is prompt and what is completion in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from spectraqlora.errors import InputError

Layout = Literal["chat", "prompt-completion", "question-answer", "alpaca", "text"]
_REQUIRED: dict[Layout, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


def recognise(columns: Iterable[str]) -> Layout:
    """The layout whose columns are all there; refuses columns that fit none."""
    found = list(columns)
    for layout, required in _REQUIRED.items():
        if set(required) <= set(found):
            return layout
    known = "; ".join(f"{name} ({', '.join(required)})" for name, required in _REQUIRED.items())
    raise InputError("data columns", ", ".join(found), f"a known layout: {known}")


def messages_of(layout: Layout, row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row as chat messages; empty where the row has nothing to learn from. Not for plain text."""
    if layout == "chat":
        messages = [
            {"role": str(m.get("role") or ""), "content": str(m.get("content") or "")}
            for m in row["messages"] or []
        ]
        complete = messages and messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()
        return messages if complete else []
    if layout == "alpaca":
        extra = str(row.get("input") or "").strip()
        prompt = str(row["instruction"] or "") + (f"\n{extra}" if extra else "")
        completion = row["output"]
    else:
        first, second = _REQUIRED[layout]
        prompt, completion = str(row[first] or ""), row[second]
    completion = "" if completion is None else str(completion)
    if not prompt.strip() or not completion.strip():
        return []
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
