"""Which rows are trained on, which are held out, and which are not used; decided by numbers of 8 bytes a row.

Equal rows (but for white space and case) have the same key and stay on one side.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spectraqlora.data.rows import Conversation, PromptCompletion, Row
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings

Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

TRAIN, HELD_OUT, TEST = range(3)
"""Codes of a row's split."""
USED, EQUAL, EQUALS_HELD_OUT, EQUALS_TEST, BEYOND_ROWS, BEYOND_HELD_OUT = range(6)
"""Codes of what becomes of a row before it is rendered."""
REASONS = {
    EQUAL: ("equal to an earlier row", "data.deduplicate=off", True),
    EQUALS_HELD_OUT: ("equal to a held-out row of the source", "", False),
    EQUALS_TEST: ("equal to a test row of the source", "", False),
    BEYOND_ROWS: ("beyond data.max_rows", "data.max_rows", True),
    BEYOND_HELD_OUT: ("held-out rows beyond data.max_eval_rows", "data.max_eval_rows", True),
}
"""By code: the reason, the setting that would keep the row, and whether a setting asked for it."""


def row_key(row: Row) -> int:
    """What equal rows share: 64 bits over the row's text without case, white space as one space."""
    if isinstance(row, Conversation):
        content: Any = [row.messages, row.tools]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False).replace("\\n", " ").replace("\\t", " ")
    elif isinstance(row, PromptCompletion):
        text = f"{row.prompt} \0 {row.completion}"
    else:
        text = row.text
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest())


@dataclass(frozen=True)
class Choice:
    """What becomes of rows before they are rendered.

    Args:
        fates: USED or the reason's code, a row each.
        order: places of the training split's rows that are used, those first that would be held out.
        held_out: places of the source's own held-out rows that are used, in their order.
        equal: rows that are used and equal an earlier one.
    """

    fates: npt.NDArray[np.uint8]
    order: Places
    held_out: Places
    equal: int


def choose(splits: npt.NDArray[np.uint8], keys: Keys, settings: DataSettings, seed: int) -> Choice:
    """Which rows are rendered.

    Args:
        splits: TRAIN, HELD_OUT or TEST, a row each.
        keys: of the rows.
        settings: the `data` section.
        seed: of the order.
    """
    fates = np.zeros(len(keys), np.uint8)
    test, held_out, train = splits == TEST, splits == HELD_OUT, splits == TRAIN
    fates[~test & np.isin(keys, keys[test])] = EQUALS_TEST
    fates[train & (fates == USED) & np.isin(keys, keys[held_out])] = EQUALS_HELD_OUT
    later = np.zeros(len(keys), bool)
    for split in (train, held_out, test):
        places = np.flatnonzero(split & (fates == USED))
        first = np.zeros(len(places), bool)
        first[np.unique(keys[places], return_index=True)[1]] = True
        later[places[~first]] = True
    if settings.deduplicate == "exact":
        fates[later] = EQUAL
    order = _in_order(np.flatnonzero(train & (fates == USED)), keys, settings, seed)
    if settings.max_rows:
        fates[order[settings.max_rows :]] = BEYOND_ROWS
        order = order[: settings.max_rows]
    own = _in_order(np.flatnonzero(held_out & (fates == USED)), keys, settings, seed)
    fates[own[settings.max_eval_rows :]] = BEYOND_HELD_OUT
    own = own[: settings.max_eval_rows]
    return Choice(fates, order, own, int((later & (fates == USED)).sum()))


def _in_order(places: Places, keys: Keys, settings: DataSettings, seed: int) -> Places:
    if settings.split_by == "shuffle":
        return places[np.random.default_rng(seed).permutation(len(places))]
    # By content the first ones, which are held out, stay so as data grows.
    return places[np.argsort(_mixed(keys[places], seed), kind="stable")]


def _mixed(keys: Keys, seed: int) -> Keys:
    """Another order of the same keys for every seed (the finisher of SplitMix64)."""
    with np.errstate(over="ignore"):
        mixed = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def held_out_target(rows: int, settings: DataSettings) -> int:
    """How many of the rows are to be held out.

    Raises:
        InputError: either side would be empty.
    """
    target = min(round(rows * settings.eval_fraction), settings.max_eval_rows)
    if target < 1 or rows - target < 1:
        raise InputError(
            "data.eval_fraction",
            settings.eval_fraction,
            f"a share that leaves rows on both sides of {rows} rows",
        )
    return target


def hold_out(keys: Keys, target: int) -> npt.NDArray[np.bool_]:
    """Which of the rows are held out: the first ones in order, equal ones together, at least `target`.

    A group of more equal rows than that is trained on. Where all rows are equal, the first ones are held out.

    Args:
        keys: of the rows, in order.
        target: how many to hold out.

    Returns:
        bool a row; both sides have rows.
    """
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(sizes), bool)
    if len(sizes) == 1:
        result: npt.NDArray[np.bool_] = np.arange(len(keys)) < target
        return result
    count = 0
    for place in group:
        size = int(sizes[place])
        if count >= target:
            break
        if not chosen[place] and size <= target and count + size < len(keys):
            chosen[place] = True
            count += size
    if not count:
        chosen[np.argmin(sizes)] = True
    return chosen[group]
