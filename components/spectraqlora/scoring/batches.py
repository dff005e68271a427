"""Tokenized rows: reading, ordering and padding them into batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from spectraqlora.artifacts import IGNORED
from spectraqlora.errors import InputError
from spectraqlora.models.families import decoder_start, pad_id


def load_rows(prepared: str | Path, split: str) -> Any:
    """The `train`, `held_out` or `test` rows among prepared ones, as a `datasets.Dataset`.

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
    """Makes batches of rows: input_ids, attention_mask, labels (sequences x tokens).

    Rows are right-padded, one a sequence, with decoder_input_ids where there is a decoder's start. Packed, several
    rows are in a sequence, and position_ids tell them apart: each row's begin at 0, and so do those of padding.
    """

    pad: int
    decoder_start: int | None
    packing: Packing | None = None

    @classmethod
    def of(cls, config: Any, packing: bool = False) -> Self:
        """For a model's config; `packing` where rows may share a sequence."""
        return cls(pad_id(config), decoder_start(config), Packing.of(config) if packing else None)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.packing is not None:
            return self.packed(rows)[0]
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

    def packed(self, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(batch with position_ids, place among `rows` of every token) of rows that share sequences.

        Places (sequences x tokens) are -1 where there is padding. A row's first token is predicted from nothing, and
        has no label.
        """
        assert self.packing is not None
        sequences = self.packing.sequences([len(row["input_ids"]) for row in rows])
        parts: dict[str, list[list[int]]] = {
            "input_ids": [],
            "labels": [],
            "attention_mask": [],
            "position_ids": [],
        }
        places: list[list[int]] = []
        width = max(sum(len(rows[place]["input_ids"]) for place in sequence) for sequence in sequences)
        for sequence in sequences:
            ids: list[int] = []
            labels: list[int] = []
            positions: list[int] = []
            owners: list[int] = []
            for place in sequence:
                row = rows[place]
                ids += list(row["input_ids"])
                labels += [IGNORED, *row["labels"][1:]]
                positions += range(len(row["input_ids"]))
                owners += [place] * len(row["input_ids"])
            empty = width - len(ids)
            parts["input_ids"].append(ids + [self.pad] * empty)
            parts["labels"].append(labels + [IGNORED] * empty)
            parts["attention_mask"].append([1] * len(ids) + [0] * empty)
            parts["position_ids"].append(positions + list(range(empty)))
            places.append(owners + [-1] * empty)
        return {name: torch.tensor(part) for name, part in parts.items()}, torch.tensor(places)

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


@dataclass(frozen=True)
class Packing:
    """Which rows of a batch share a sequence: so many as cost least.

    Attention within a sequence of L tokens costs with its square, everything else with the tokens, padding included:
    n sequences of L tokens cost n L (6 d + L) at width d, as 24 d² L multiplications are linear layers' and 4 d L²
    attention's in a block of the usual shape.

    Args:
        width: of the model.
        single: all rows in one sequence, as flash attention's kernels for rows of several lengths want it.
    """

    width: int
    single: bool = False

    @classmethod
    def of(cls, config: Any) -> Self:
        """For a model's config."""
        implementation = getattr(config, "_attn_implementation", None) or ""
        return cls(int(config.get_text_config().hidden_size), "flash" in str(implementation))

    def sequences(self, lengths: list[int]) -> list[list[int]]:
        """Places of the rows in each sequence.

        Args:
            lengths: tokens of every row.
        """
        if self.single:
            return [list(range(len(lengths)))]
        shared = (_shared_out(lengths, count) for count in range(1, len(lengths) + 1))
        return min(shared, key=lambda parts: self._cost(lengths, parts))

    def _cost(self, lengths: list[int], sequences: list[list[int]]) -> int:
        longest = max(sum(lengths[place] for place in sequence) for sequence in sequences)
        return len(sequences) * longest * (6 * self.width + longest)


def _shared_out(lengths: list[int], count: int) -> list[list[int]]:
    """Rows in `count` sequences of about equal lengths: the longest row left goes to the shortest sequence."""
    sequences: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        shortest = totals.index(min(totals))
        sequences[shortest].append(place)
        totals[shortest] += lengths[place]
    return [sorted(sequence) for sequence in sequences]


@contextlib.contextmanager
def attention_by_position(model: Any) -> Iterator[None]:
    """Inside, batches with position_ids reach the model without attention_mask, and without a cache.

    Then transformers tells the rows of a sequence apart by their positions.
    """

    def without_mask(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if given.get("position_ids") is not None:
            given = {name: value for name, value in given.items() if name != "attention_mask"} | {
                "use_cache": False
            }
        return args, given

    hook = model.register_forward_pre_hook(without_mask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
