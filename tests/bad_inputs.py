"""Bad inputs by class, as tables: what is made, and what its one line has to name.

A case's `make` gets a folder of its own and the tiny base model and does what a command does with such an input; tests
run it through the command line's own entry point.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from spectraqlora.errors import InputError, NoAnswer
from spectraqlora_pipelines.cli import app

LINE = re.compile(
    r"error: (?P<field>[^\n]+?): (?P<value>['\"][^\n]*['\"]): expected (?P<expected>[^\n]{4,})\n"
)
"""Field, value and expectation, as `InputError` writes them."""
TOLD_BY_TYPER = re.compile(r"Error|Usage|Missing|Invalid|No such")


@dataclass(frozen=True)
class Outcome:
    """How the command line ended."""

    code: object
    out: str
    err: str


def ended(action: Callable[[], object]) -> Outcome:
    """Run an action as the command line runs its commands: what it raises becomes a line and an exit code.

    Raises:
        Exception: whatever would have been a traceback.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(app, "app", lambda **_: action()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            app.main()
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
    return Outcome(code, out.getvalue(), err.getvalue())


def command(*arguments: object) -> Callable[[], object]:
    """A command of the command line, as an action."""
    original = app.app

    def run() -> object:
        with patch.object(sys, "argv", ["spectraqlora", *map(str, arguments)]):
            return original(standalone_mode=False)

    return run


def check_refused(action: Callable[[], Any], named: str, silent: bool = False) -> None:
    """Exit code 2 and one line of field, value and expectation that names what is wrong.

    Args:
        action: what a command does with the input.
        named: regular expression that the line must match.
        silent: whether nobody answers, which another attempt may not meet: exit code 75, and the line says so.
    """
    outcome = ended(action)
    kind = NoAnswer if silent else InputError
    assert outcome.code == kind.exit_code, f"ended with {outcome}"
    assert (f"error: {NoAnswer.prefix}" in outcome.err) == silent, f"ended with {outcome}"
    lines = [line for line in outcome.err.splitlines(keepends=True) if not line.startswith("warning: ")]
    text = "".join(lines)
    assert len(lines) == 1 and LINE.fullmatch(text), f"no line of field, value and expectation: {text!r}"
    assert re.search(named, text), f"{named!r} is not named: {text!r}"
    assert "Traceback" not in outcome.out + outcome.err and len(text) < 1500


def written(path: Path, content: str | bytes) -> Path:
    """A file with this content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
