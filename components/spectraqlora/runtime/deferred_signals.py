"""Being stopped by a signal: recorded when it comes, acted on where the work can be resumed later."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], int]]:
    """Inside, SIGTERM and SIGINT are only recorded; yields what returns the number that came, 0 for none.

    Kubernetes sends SIGTERM and, by default, 30 seconds later SIGKILL. Outside a process's main thread
    signals cannot be caught, and none is ever recorded.
    """
    came = 0

    def record(number: int, frame: object) -> None:
        nonlocal came
        came = number

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
