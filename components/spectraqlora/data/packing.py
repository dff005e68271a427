"""Plain text in full sequences instead of padded ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int32]


def packed(rows: Iterable[tuple[Numbers, Numbers]], length: int) -> Iterator[tuple[Numbers, Numbers]]:
    """All tokens of all rows in turn, cut into sequences of `length` tokens.

    A short rest is kept only where it is all there is.

    Args:
        rows: (token ids, labels next to them) of each.
        length: tokens of a sequence.
    """
    ids, labels = np.zeros(0, np.int32), np.zeros(0, np.int32)
    full = False
    for row_ids, row_labels in rows:
        ids, labels = np.concatenate([ids, row_ids]), np.concatenate([labels, row_labels])
        while len(ids) >= length:
            full = True
            yield ids[:length], labels[:length]
            ids, labels = ids[length:], labels[length:]
    if len(ids) and not full:
        yield ids, labels
