"""Tokenized rows: reading, ordering and padding them into batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from spectraqlora.artifacts import IGNORED
from spectraqlora.errors import InputError
from spectraqlora.models.families import decoder_start


def load_rows(prepared: str | Path, split: str) -> Any:
    """The `train` or `held_out` rows among prepared ones, as a `datasets.Dataset`.

    Raises:
        InputError: they are missing or cut short.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(Path(prepared) / split))
    except (OSError, ValueError):
        raise InputError("prepared rows", Path(prepared) / split, "a complete Arrow folder") from None


def order(count: int, seed: int, start: int, stop: int) -> list[int]:
    """Places `start` to `stop` of an endless reading order over `count` rows, shuffled anew every epoch."""
    places: list[int] = []
    for epoch in range(start // count, -(-stop // count)):
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        places += shuffled[max(start - epoch * count, 0) : stop - epoch * count]
    return places


@dataclass(frozen=True)
class Collator:
    """Right-pads rows: input_ids, attention_mask, labels (rows x tokens); decoder_input_ids where there is a decoder's start."""

    pad: int
    decoder_start: int | None

    @classmethod
    def of(cls, config: Any) -> Self:
        """For a model's config."""
        return cls(config.pad_token_id or 0, decoder_start(config))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        labels = self._padded([row["labels"] for row in rows], IGNORED)
        batch = {
            "input_ids": self._padded(ids, self.pad),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
            "labels": labels,
        }
        if self.decoder_start is not None:
            shifted = torch.full_like(labels, self.decoder_start)
            shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.pad)
            batch["decoder_input_ids"] = shifted
        return batch

    def _padded(self, rows: list[list[int]], fill: int) -> torch.Tensor:
        padded = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = torch.as_tensor(row)
        return padded

    def batches(self, rows: Any, size: int, limit: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Rows in order, `size` at a time; at most `limit` batches where it is not 0."""
        stop = len(rows) if limit == 0 else min(len(rows), size * limit)
        for start in range(0, stop, size):
            yield self([rows[i] for i in range(start, min(start + size, stop))])
