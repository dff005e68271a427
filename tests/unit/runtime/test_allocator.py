"""Tensors that a step frees are the system's again, unless its user chose how memory is allocated."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from spectraqlora.runtime.allocator import OWN

FREES = """
import sys
from pathlib import Path
from spectraqlora.runtime.allocator import keep_tensors_out_of_heaps

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

bytearray(16 << 20)  # Freed at once: blocks up to this size go to the heap from here on, as glibc is by itself.
before = resident()
if "outside" in sys.argv:
    keep_tensors_out_of_heaps()
tensors = [bytearray(4 << 20) for _ in range(20)]
small = [bytearray(100_000) for _ in range(100)]  # In the heap, above what is freed then.
del tensors
print(resident() - before - sum(map(len, small)))
"""


def left_after_freeing(*arguments: str, **environment: str) -> int:
    """Bytes that stay resident of 80 MiB that were taken and freed below blocks that stay."""
    own = {name: value for name, value in os.environ.items() if name not in OWN}
    done = subprocess.run(
        [sys.executable, "-c", FREES, *arguments],
        capture_output=True, text=True, check=True,
        env={**own, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(
    "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")), reason="glibc's allocator alone is set"
)
def test_freed_tensors_go_back_at_once_unless_the_user_chose_otherwise() -> None:
    taken = 80 << 20
    assert left_after_freeing() > taken / 2, "what glibc does by itself"
    assert left_after_freeing("outside") < taken / 10
    chosen = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}
    assert left_after_freeing("outside", **chosen) > taken / 2
