"""Which rows are trained on, which are held out, and which are not used; decided by numbers of 8 bytes a row.

Equal rows (but for white space and case) have the same key and stay on one side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spectraqlora.data.near import mixed
from spectraqlora.data.rows import Conversation, PromptCompletion, Row
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings

Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

Split = Literal["train", "held_out", "test"]
TRAIN, HELD_OUT, TEST = range(3)
"""Codes of a row's split."""
USED, EQUAL, EQUALS_HELD_OUT, EQUALS_TEST, NEAR, NEAR_HELD_OUT, NEAR_TEST, *_BEYOND = range(11)
BEYOND_ROWS, BEYOND_HELD_OUT, BEYOND_TEST, BEYOND_WEIGHT = _BEYOND
"""Codes of what becomes of a row before it is rendered; a nearly equal row's are those of an equal one, plus NEAR - EQUAL."""
REASONS = {
    EQUAL: ("equal to an earlier row", "data.deduplicate=off", True),
    EQUALS_HELD_OUT: ("equal to a held-out row of the source", "", False),
    EQUALS_TEST: ("equal to a test row of the source", "", False),
    NEAR: ("nearly equal to an earlier row", "data.deduplicate=exact", True),
    NEAR_HELD_OUT: ("nearly equal to a held-out row of the source", "data.deduplicate=exact", True),
    NEAR_TEST: ("nearly equal to a test row of the source", "data.deduplicate=exact", True),
    BEYOND_ROWS: ("beyond data.max_rows", "data.max_rows", True),
    BEYOND_WEIGHT: ("beyond their source's weight", "data.sources", True),
    BEYOND_HELD_OUT: ("held-out rows beyond data.max_eval_rows", "data.max_eval_rows", True),
    BEYOND_TEST: ("test rows beyond data.max_test_rows", "data.max_test_rows", True),
}
"""By code: the reason, the setting that would keep the row, and whether a setting asked for it."""


def row_text(row: Row) -> str:
    """What equal rows share: the row's text without case, white space as one space."""
    if isinstance(row, Conversation):
        content: Any = [row.messages, row.tools]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False).replace("\\n", " ").replace("\\t", " ")
    elif isinstance(row, PromptCompletion):
        text = f"{row.prompt} \0 {row.completion}"
    else:
        text = row.text
    return " ".join(text.casefold().split())


def text_key(text: str) -> int:
    """64 bits over what `row_text` says of a row."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


@dataclass(frozen=True)
class Choice:
    """What becomes of rows before they are rendered.

    Args:
        fates: USED or the reason's code, a row each.
        order: places of the training split's rows that are used, those first that would be kept for a test, then those
            that would be held out.
        held_out: places of the source's own held-out rows that are used, in their order.
        test: the same of its test rows.
        equal: rows that are used and equal an earlier one.
    """

    fates: npt.NDArray[np.uint8]
    order: Places
    held_out: Places
    test: Places
    equal: int


def choose(
    splits: npt.NDArray[np.uint8],
    keys: Keys,
    settings: DataSettings,
    seed: int,
    groups: Places | None = None,
    sources: npt.NDArray[np.uint16] | None = None,
) -> Choice:
    """Which rows are rendered.

    Args:
        splits: TRAIN, HELD_OUT or TEST, a row each.
        keys: of the rows.
        settings: the `data` section.
        seed: of the order.
        groups: place of the first of the rows that are nearly equal to each other, a row each; where
            `data.deduplicate` is near.
        sources: place of each row's source among `data.sources`; None where there is one source.
    """
    fates, later = _equal(splits, keys)
    if settings.deduplicate != "off":
        fates[later] = EQUAL
    if groups is not None:
        near, later = _equal(splits, groups.astype(np.uint64))
        near[later] = EQUAL
        fates = np.where((near != USED) & (fates == USED), near + NEAR - EQUAL, fates).astype(np.uint8)
    order = _in_order(np.flatnonzero((splits == TRAIN) & (fates == USED)), keys, settings, seed)
    weights = [part.weight for part in settings.parts if part.weight is not None]
    if weights and sources is not None:
        mixture = order[_mixture(sources[order], weights)]
        fates[np.setdiff1d(order, mixture)] = BEYOND_WEIGHT
        order = mixture
    if settings.max_rows:
        fates[order[settings.max_rows :]] = BEYOND_ROWS
        order = order[: settings.max_rows]
    own = {}
    for split, code, most, beyond in (
        ("held_out", HELD_OUT, settings.max_eval_rows, BEYOND_HELD_OUT),
        ("test", TEST, settings.max_test_rows, BEYOND_TEST),
    ):
        places = _in_order(np.flatnonzero((splits == code) & (fates == USED)), keys, settings, seed)
        fates[places[most:]] = beyond
        own[split] = places[:most]
    return Choice(fates, order, own["held_out"], own["test"], int((later & (fates == USED)).sum()))


def _mixture(sources: npt.NDArray[np.uint16], weights: Sequence[float]) -> Places:
    """Places of the rows that make the mixture: as many as there are in the weights' proportion, none twice.

    Of each source they are the first ones, in their order, and every stretch of the mixture has the proportion.

    Args:
        sources: place of each row's source, in the rows' order.
        weights: of the sources.

    Raises:
        InputError: a source has no rows, or too few for its weight.
    """
    counts = np.bincount(sources, minlength=len(weights))
    whole = min(count / weight for count, weight in zip(counts, weights, strict=True))
    share = np.full(len(sources), np.inf)
    for source, weight in enumerate(weights):
        # A hair more: 0.1 * (30 / 0.1) may be less than 30.
        wanted = int(whole * weight * (1 + 1e-9))
        if wanted < 1:
            raise InputError(
                f"data.sources[{source}]",
                f"weight {weight:g}",
                f"a weight that leaves rows of every source; this one has {counts[source]}",
            )
        share[np.flatnonzero(sources == source)[:wanted]] = (np.arange(wanted) + 0.5) / wanted
    return np.argsort(share, kind="stable")[: np.isfinite(share).sum()]


def _equal(splits: npt.NDArray[np.uint8], keys: Keys) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Codes of rows that equal one of a split that comes before theirs, and which rows equal an earlier one of theirs."""
    fates, later = np.zeros(len(keys), np.uint8), np.zeros(len(keys), bool)
    test, held_out, train = splits == TEST, splits == HELD_OUT, splits == TRAIN
    fates[~test & np.isin(keys, keys[test])] = EQUALS_TEST
    fates[train & (fates == USED) & np.isin(keys, keys[held_out])] = EQUALS_HELD_OUT
    for split in (train, held_out, test):
        places = np.flatnonzero(split & (fates == USED))
        first = np.zeros(len(places), bool)
        first[np.unique(keys[places], return_index=True)[1]] = True
        later[places[~first]] = True
    return fates, later


def _in_order(places: Places, keys: Keys, settings: DataSettings, seed: int) -> Places:
    if settings.split_by == "shuffle":
        return places[np.random.default_rng(seed).permutation(len(places))]
    # By content the first ones, which are held out, stay so as data grows.
    return places[np.argsort(_mixed(keys[places], seed), kind="stable")]


def _mixed(keys: Keys, seed: int) -> Keys:
    """Another order of the same keys for every seed."""
    with np.errstate(over="ignore"):
        return mixed(keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64))


def side_sizes(rows: int, settings: DataSettings, own: Collection[Split]) -> tuple[int, int]:
    """How many of the training split's rows are to be kept for a test, and how many are to be held out.

    Args:
        rows: of the training split.
        settings: the `data` section.
        own: splits that the source brings; of these nothing is taken from the training rows.

    Raises:
        InputError: nothing would be held out, or nothing left to train on.
    """
    held_out = 0 if "held_out" in own else min(round(rows * settings.eval_fraction), settings.max_eval_rows)
    if rows - held_out < 1 or ("held_out" not in own and held_out < 1):
        raise InputError(
            "data.eval_fraction",
            settings.eval_fraction,
            f"a share that leaves rows on both sides of {rows} rows",
        )
    test = 0 if "test" in own else min(round(rows * settings.test_fraction), settings.max_test_rows)
    if rows - held_out - test < 1:
        raise InputError(
            "data.test_fraction",
            settings.test_fraction,
            f"a share that leaves rows to train on of {rows} rows, of which {held_out} are held out",
        )
    return test, held_out


@dataclass(frozen=True)
class Sides:
    """Which of the rows to train on are kept for a test, and which are held out; bool a row each."""

    test: npt.NDArray[np.bool_]
    held_out: npt.NDArray[np.bool_]


def part_rows(keys: Keys, test: int, held_out: int) -> Sides:
    """Part the training split's rows: the first ones in order are the test's, those that follow are held out.

    So a row that was trained on becomes neither as data grows that is ordered by content, and one that was held out
    is never tested on. Equal rows are together. Where all others are equal, none are kept for a test.

    Args:
        keys: of the rows, in order.
        test: how many to keep for a test.
        held_out: how many to hold out.
    """
    tested = hold_out(keys, test) if test else np.zeros(len(keys), bool)
    if len(np.unique(keys[~tested])) < 2:
        tested[:] = False
    chosen = np.zeros(len(keys), bool)
    if held_out:
        chosen[~tested] = hold_out(keys[~tested], held_out)
    return Sides(tested, chosen)


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
