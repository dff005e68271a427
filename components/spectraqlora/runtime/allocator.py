"""Where the memory of tensors lies, so that it is the system's again once they are freed.

glibc gives blocks below its mmap threshold to heaps, and raises the threshold, up to 32 MiB, with every larger block that
is freed. A heap shrinks at its end alone: one small block above a freed tensor keeps all below it resident. With the
threshold as it grows training lost more in heaps than its tensors take; with a low one every block costs page faults.
Figures of both are in tests/benchmarks/README.md, under Memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables with which a user chooses how memory is allocated."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_OUTSIDE_BYTES = 2**20


def keep_tensors_out_of_heaps() -> None:
    """From here on blocks of 1 MiB and more get pages of their own, for as long as they live.

    Nothing where the C library is no glibc, or where users chose.
    """
    if any(os.environ.get(name) for name in OWN):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # No mallopt, no C library by that name.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _OUTSIDE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _OUTSIDE_BYTES)
