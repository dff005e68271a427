"""A row as chat messages, whatever its layout: what is prompt and what is completion in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectraqlora.data.layouts import COLUMNS, Layout

Messages = list[dict[str, str]]
"""Of a `role` (system, user, assistant) and a `content` each, in order."""


def messages_of(layout: Layout, row: Mapping[str, Any]) -> Messages:
    """A row's messages, the last one by the assistant; empty where there is nothing to learn from.

    Args:
        layout: of the row; any but plain text.
        row: value by column.
    """
    if layout == "chat":
        messages = [
            {"role": str(m.get("role") or ""), "content": str(m.get("content") or "")}
            for m in row["messages"] or []
        ]
        complete = messages and messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()
        return messages if complete else []
    before, after = COLUMNS[layout]
    prompt = str(row[before] or "")
    if layout == "alpaca":
        extra = str(row.get("input") or "").strip()
        prompt += f"\n{extra}" if extra else ""
    completion = "" if row[after] is None else str(row[after])
    if not prompt.strip() or not completion.strip():
        return []
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
