"""Rows that are nearly equal: the Jaccard similarity of their texts' shingles, estimated by MinHash.

A text's shingles are its runs of five characters. The share of 128 hash functions under which two texts have the same
smallest shingle estimates the share of shingles that they have in common (Broder 1997, On the resemblance and
containment of documents); its standard error is 0.04 at 0.8. Of each minimum 16 bits are kept (b-bit minwise hashing,
Li and König, arXiv 0910.3349): 256 bytes a row, and four of them are one number to look for candidates by. The index
of a library such as datasketch takes some kilobytes of Python objects a row instead.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SIMILARITY = 0.8
"""Texts that have at least this share of their shingles in common are nearly equal."""
FUNCTIONS = 128
_SHINGLE = 5
_BAND = 4
"""Minima that candidates have in common, side by side: texts of similarity 0.8 share one of 32 bands in all but 1 of 10^7 cases."""
_BLOCK = 4096
Signatures = npt.NDArray[np.uint16]
Places = npt.NDArray[np.int64]

_DRAW = np.random.default_rng(0)
_FACTORS = _DRAW.integers(0, 2**63, (FUNCTIONS, 1), np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _DRAW.integers(0, 2**63, (FUNCTIONS, 1), np.uint64)


def mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers as if drawn at random, each always the same (the finisher of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def signature(text: str) -> Signatures:
    """The MinHash of a text, [FUNCTIONS]."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    points = np.pad(points, (0, max(0, _SHINGLE - len(points))))
    shingles = np.zeros(len(points) - _SHINGLE + 1, np.uint64)
    for offset in range(_SHINGLE):
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + points[offset : offset + len(shingles)]
    shingles = mixed(np.unique(shingles))
    least = np.full(FUNCTIONS, 2**32, np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        hashed = (_FACTORS * shingles[start : start + _BLOCK] + _TERMS) >> np.uint64(32)
        least = np.minimum(least, hashed.min(axis=1))
    return least.astype(np.uint16)


def groups(signatures: Signatures) -> Places:
    """The place of the first row of each row's group: rows that are linked by pairs of nearly equal ones.

    Of the rows that have a band in common, each is compared with the first and with the one before it.

    Args:
        signatures: [rows, FUNCTIONS].
    """
    first = np.arange(len(signatures))
    for band in np.ascontiguousarray(signatures).view(np.uint64).T:
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0])
        head = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
        inside = order != head
        rows = order[inside]
        for other in (head[inside], np.roll(order, 1)[inside]):
            first = _joined(first, *_similar(signatures, *_apart(first, rows, other)))
    return first


def _apart(first: Places, rows: Places, others: Places) -> tuple[Places, Places]:
    """The pairs that are not of one group already."""
    apart = first[rows] != first[others]
    return rows[apart], others[apart]


def _similar(signatures: Signatures, rows: Places, others: Places) -> tuple[Places, Places]:
    """The pairs that are nearly equal."""
    similar = np.zeros(len(rows), bool)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        similar[part] = (signatures[rows[part]] == signatures[others[part]]).mean(axis=1) >= SIMILARITY
    return rows[similar], others[similar]


def _joined(first: Places, rows: Places, others: Places) -> Places:
    """Groups after the rows of each pair came together; the first row of a group is its own."""
    while True:
        ours, theirs = first[rows], first[others]
        if (ours == theirs).all():
            return first
        least = np.minimum(ours, theirs)
        first = first.copy()
        # The group's first row takes all others along.
        np.minimum.at(first, ours, least)
        np.minimum.at(first, theirs, least)
        while (first[first] != first).any():
            first = first[first]
