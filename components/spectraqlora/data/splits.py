"""Which rows are trained on and which are held out."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings


def split_sizes(rows: int, settings: DataSettings) -> tuple[int, int]:
    """(train rows, held-out rows) of a number of rows.

    Raises:
        InputError: either side would be empty.
    """
    if settings.max_rows:
        rows = min(rows, settings.max_rows)
    held_out = min(round(rows * settings.eval_fraction), settings.max_eval_rows)
    if held_out < 1 or rows - held_out < 1:
        raise InputError(
            "data.eval_fraction",
            settings.eval_fraction,
            f"a share that leaves rows on both sides of {rows} rows",
        )
    return rows - held_out, held_out


def in_order(rows: Any, settings: DataSettings, seed: int) -> Any:
    """At most `data.max_rows` rows of a `datasets.Dataset`, those first that are held out."""
    ordered = rows.shuffle(seed=seed) if settings.split_by == "shuffle" else _by_content(rows, seed)
    return ordered.select(range(min(len(rows), settings.max_rows))) if settings.max_rows else ordered


def _by_content(rows: Any, seed: int) -> Any:
    """In the order of a digest of each row: the first ones, which are held out, stay so as data grows."""
    keys = [
        hashlib.sha256(f"{seed}{json.dumps(row, sort_keys=True, default=str)}".encode()).digest()
        for row in rows
    ]
    return rows.select(sorted(range(len(keys)), key=keys.__getitem__))
