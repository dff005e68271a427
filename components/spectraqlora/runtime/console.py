"""What a step says: lines that read well in a pod's log, and that the command line turns into bars.

All of them go through the logger `spectraqlora` to standard output, one line at a time:

    scoring the base model                         say
    WARNING: no checkpoint of step 40: …           warn
    error: data.source: 'x.jsonl': expected …      fail
    error: no answer: tracking.uri: 'http://…      fail, where another attempt may succeed
    progress: 12/40 hybrid round 1: training step  Progress
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from spectraqlora.errors import printable

PROGRESS, ERROR = "progress:", "error:"
"""How lines begin that the command line reads."""
_SECONDS_BETWEEN_LINES = 0.5
_HEADS = {logging.WARNING: "WARNING: ", logging.ERROR: f"{ERROR} "}


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _HEADS.get(record.levelno, "") + printable(record.getMessage())


class _StandardOutput(logging.StreamHandler[TextIO]):
    """Writes to what standard output is when a line is said, so that it can be redirected."""

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def _logger() -> logging.Logger:
    """The logger with its own handler: KFP's executor puts a time and a level before the root logger's lines."""
    logger = logging.getLogger("spectraqlora")
    handler = _StandardOutput()
    handler.setFormatter(_Lines())
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return logger


_LOGGER = _logger()


def say(line: str) -> None:
    """A line for whoever reads along."""
    _LOGGER.info("%s", line)


def warn(line: str) -> None:
    """A line about something that a person should look at, while the work continues."""
    _LOGGER.warning("%s", line)


def fail(line: str) -> None:
    """The line that says why a step ends; the command line repeats it on the screen."""
    _LOGGER.error("%s", line)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, only errors are printed."""
    before = _LOGGER.level
    _LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOGGER.setLevel(before)


class Progress:
    """Prints `progress: done/total label` at most about twice a second, and always at the end.

    Args:
        label: what is counted.
        total: how many there are.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self._last = label, total, 0.0

    def __call__(self, done: int, note: str = "") -> None:
        """Report that `done` of the total are done, `note` being the latest of them."""
        now = time.monotonic()
        if done < self.total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        say(f"{PROGRESS} {done}/{self.total} {self.label} {note}".rstrip())
