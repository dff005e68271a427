"""Tokenized rows: reading them and padding them into batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from spectraqlora.errors import InputError

IGNORED = -100
"""Label of a token that does not count in the loss."""


def load_rows(data: str | Path, split: str) -> Any:
    """The `train` or `eval` split of prepared data, as a `datasets.Dataset`."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(Path(data) / split))
    except (OSError, ValueError):
        raise InputError("prepared data", Path(data) / split, "a whole Arrow folder") from None


def collate(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Right-pad rows to the longest: input_ids, attention_mask and labels (rows x tokens)."""
    width = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, pad, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.as_tensor(row["input_ids"])
        mask[index, :length] = 1
        labels[index, :length] = torch.as_tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(rows: Any, size: int, pad: int, limit: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Rows in order, `size` at a time; at most `limit` batches where it is not 0."""
    stop = len(rows) if limit == 0 else min(len(rows), size * limit)
    for start in range(0, stop, size):
        yield collate([rows[i] for i in range(start, min(start + size, stop))], pad)
