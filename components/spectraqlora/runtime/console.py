"""Progress lines that read well in a pod's log and that the command line turns into bars."""

from __future__ import annotations

import time

PREFIX = "progress:"


class Progress:
    """Prints `progress: done/total label` at most about twice a second, and always at the end."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self._last = label, total, 0.0

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done < self.total and now - self._last < 0.5:
            return
        self._last = now
        print(f"{PREFIX} {done}/{self.total} {self.label} {note}".rstrip(), flush=True)
