"""How a part of the check measures, and how it writes down what it has measured so far."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEVER = ("mlflow", "kfp")
"""Packages that the check's path must not import: the machine lacks them."""


class Record:
    """A JSON document that is complete on the disk after every change.

    Args:
        path: of the document; a part begins a new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: dict[str, Any] = {}
        self._write()

    def put(self, key: str, value: Any) -> None:
        """Set one entry."""
        self._content[key] = value
        self._write()

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row to a list, and print it."""
        print(json.dumps(row), flush=True)
        self._content.setdefault(key, []).append(row)
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._content, indent=1), encoding="utf-8")
        os.replace(partial, self.path)


@dataclass(frozen=True)
class Part:
    """What every part is called with."""

    work: Path
    """Folder that the parts share."""
    small: bool
    """Tiny shapes, for the dry run."""
    deadline: float
    """By `time.monotonic`: nothing that may take longer is begun."""
    record: Record

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


@contextlib.contextmanager
def part(description: str | None) -> Iterator[Part]:
    """Read a part's arguments, and from standard input, once it may begin, the seconds that it has.

    The end of standard input is that of the check, and ends the part: nothing may hold the card after it. At the
    part's own end, imports that the machine could not have made are refused.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    said = sys.stdin.readline()
    if not said:
        raise SystemExit("ended before it began")
    deadline = time.monotonic() + float(said)
    # Of its own: pytest puts another file in the place of standard input.
    threading.Thread(target=_end_with_the_check, args=[os.dup(sys.stdin.fileno())], daemon=True).start()
    yield Part(options.work, options.small, deadline, Record(options.record))
    check_imports()


def _end_with_the_check(stdin: int) -> None:
    # Unbuffered: a lock of sys.stdin's would be held when the interpreter ends.
    while os.read(stdin, 1):
        pass
    os._exit(1)


def check_imports() -> None:
    """Refuse packages of `NEVER` in this process.

    Raises:
        AssertionError: one was imported.
    """
    imported = [name for name in NEVER if name in sys.modules]
    assert not imported, f"imported {', '.join(imported)}, which a GPU machine need not have"


@dataclass
class Meter:
    """Seconds between ticks, and the peak memory since the start: on the GPU, else resident."""

    ticks: list[float] = field(default_factory=list)
    start: int = 0
    """Bytes held at the start, on the GPU."""
    peak: int = 0

    def tick(self) -> None:
        """A step has ended, on the device too."""
        self.ticks.append(_now())

    def seconds(self) -> float:
        """Median of the steps after the first."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.ticks))


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Measure what runs inside; the peak is kept where the code inside resets the device's own."""
    import torch

    meter = Meter()
    reset = torch.cuda.reset_peak_memory_stats

    def resetting(*arguments: Any) -> None:
        meter.peak = max(meter.peak, peak_bytes())
        reset(*arguments)

    _reset_peak()
    if torch.cuda.is_available():
        meter.start = int(torch.cuda.memory_allocated())
    torch.cuda.reset_peak_memory_stats = resetting
    try:
        yield meter
    finally:
        torch.cuda.reset_peak_memory_stats = reset
        meter.peak = max(meter.peak, peak_bytes())


@contextlib.contextmanager
def timed() -> Iterator[Meter]:
    """As `metered`, with one tick at the start and one at the end."""
    with metered() as meter:
        meter.tick()
        yield meter
        meter.tick()


def peak_bytes() -> int:
    """Peak allocated on the GPU since the last reset; without one, peak resident memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Some containers forbid it: the peak is then that of the process.
            Path("/proc/self/clear_refs").write_text("5")


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
