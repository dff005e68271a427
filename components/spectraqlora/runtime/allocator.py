"""Where the memory of weights lies, so that it is the system's again once they are freed.

glibc gives blocks below its mmap threshold to heaps, and raises the threshold, up to 32 MiB, with every larger block that is
freed. A heap shrinks at its end alone: one small block above a freed model keeps all of it resident. For tensors that come
and go at every layer that is right, since a heap gives them again without a page fault, which made training up to twice as
slow; not for weights, which come once and go once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables with which a user chooses how memory is allocated."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_OUTSIDE_BYTES = 256 * 2**10
_GLIBCS_LARGEST_BYTES = 32 * 2**20
"""Where glibc's own threshold ends; it trims a heap that has twice that free at its end."""


@contextlib.contextmanager
def outside_of_heaps() -> Iterator[None]:
    """Inside, blocks from 256 KiB on get pages of their own; nothing where the C library is another, or users chose."""
    _set_thresholds(_OUTSIDE_BYTES)
    try:
        yield
    finally:
        _set_thresholds(_GLIBCS_LARGEST_BYTES)


def _set_thresholds(size: int) -> None:
    if any(os.environ.get(name) for name in OWN):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # No mallopt, no C library by that name.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, size)
        mallopt(_M_TRIM_THRESHOLD, 2 * size)
