"""Jobs on a bounded number of threads, and the progress they share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from spectraqlora.runtime.console import Progress
from spectraqlora.storage.connection import MIB


class Meter:
    """Bytes moved so far, printed as MiB; safe to share between threads."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._total, self._done, self._lock = total_bytes, 0, threading.Lock()
        self._progress = Progress(f"{label}, MiB", max(1, math.ceil(total_bytes / MIB)))

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            # Whole MiB only, so that the last line comes with the last byte and not before it.
            if self._done < self._total:
                self._progress(self._done // MIB)

    def finish(self) -> None:
        self._progress(self._progress.total)


def run_all(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Run every job, in order, on at most `workers` threads; the first fault stops what has not started."""
    if not jobs:
        return
    with ThreadPoolExecutor(min(workers, len(jobs)), "storage") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
    for future in done:
        future.result()
