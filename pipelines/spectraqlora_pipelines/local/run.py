"""Running the compiled DAG with kfp.local: logs to a file, progress on screen, results in the workdir."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from spectraqlora.errors import InputError, NoAnswer
from spectraqlora.runtime import run_key
from spectraqlora.runtime.console import ERROR, PROGRESS
from spectraqlora.runtime.step import LAUNCHER_PID

from spectraqlora_pipelines.local.outputs import RunOutputs, recorded
from spectraqlora_pipelines.local.reuse import StepResults

if TYPE_CHECKING:
    from spectraqlora_pipelines.local.containers import HostAccess

_GRACE_S = 30
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_KFPS = re.compile(r"\d\d:\d\d:\d\d\.\d+ - |\[KFP Executor |-{40}")
"""How lines begin that kfp.local writes around those of a step."""
_RANK = re.compile(r"^(\s*)\[rank\d+\]: ?")
_PROGRESS = re.compile(rf"{PROGRESS} (\d+)/(\d+) (.*)")


@contextlib.contextmanager
def _steps_end_with_us() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the running step first; a step whose command line is killed ends itself."""

    def stop(number: int, frame: object) -> None:
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        # Training ends after its current step and a checkpoint, everything else at once.
        _, alive = psutil.wait_procs(children, timeout=_GRACE_S)
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        raise KeyboardInterrupt

    os.environ[LAUNCHER_PID] = str(os.getpid())
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        del os.environ[LAUNCHER_PID]


@contextlib.contextmanager
def _steps_know(key: str) -> Iterator[None]:
    """The run's key stands in the environment that steps inherit."""
    before = os.environ.get(run_key.VARIABLE)
    os.environ[run_key.VARIABLE] = key
    try:
        yield
    finally:
        del os.environ[run_key.VARIABLE]
        if before is not None:
            os.environ[run_key.VARIABLE] = before


class StepFailed(Exception):
    """A step ended with an error that is not the user's input."""


class _StepOutput:
    """What of a step's lines says how it went, however many more it wrote afterwards."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        """What it said of its input."""
        self.error: str | None = None
        """The last line of its last traceback."""
        self.last = ""
        self._traceback: int | None = None
        """How far the traceback that is being written is indented, as kfp.local indents a step's lines."""

    def add(self, line: str) -> None:
        """Take a line as it was written, without colours."""
        line = _RANK.sub(r"\1", line.rstrip())
        clean = line.strip()
        if not clean:
            return
        if not _KFPS.match(clean):
            self.last = clean
        if clean.startswith(f"{ERROR} "):
            self.refusal = clean.removeprefix(f"{ERROR} ")
        indent = len(line) - len(line.lstrip())
        if clean.startswith("Traceback (most recent call last)"):
            self._traceback = indent
        elif self._traceback is not None and indent <= self._traceback:
            self.error, self._traceback = clean, None

    @property
    def reason(self) -> str:
        """Why it failed, as far as its lines say."""
        return self.error or self.last


class _Lines(io.TextIOBase):
    """Splits what kfp.local prints into lines: each goes to the log file, to a listener, and to its step's output.

    A step runs, and what it writes is printed, in the thread that executes its task: that is how lines of steps
    that run at the same time are told apart.
    """

    def __init__(self, log: Path, listen: Callable[[str], None]) -> None:
        self._file = open(log, "a", encoding="utf-8")  # noqa: SIM115 - closed with the stream
        self._listen = listen
        self._rest: dict[int, str] = {}
        self._step: dict[int, str] = {}
        self._written = ""
        self.outputs: dict[str, _StepOutput] = {"": _StepOutput()}

    def begin(self, step: str) -> None:
        """From now on this thread writes for a step."""
        self._step[threading.get_ident()] = step
        self.outputs[step] = _StepOutput()

    def write(self, text: str) -> int:
        thread = threading.get_ident()
        step = self._step.get(thread, "")
        *lines, self._rest[thread] = (self._rest.get(thread, "") + text).split("\n")
        for line in lines:
            plain = _ANSI.sub("", line)
            self._log(step, plain)
            self.outputs[step].add(plain)
            if clean := plain.strip():
                self._listen(clean)
        return len(text)

    def _log(self, step: str, line: str) -> None:
        head = f"\n===== {step} =====\n" if step != self._written else ""
        self._written = step
        # On a full disk the log is cut short; what counts is what the step says.
        with contextlib.suppress(OSError):
            self._file.write(f"{head}{line}\n")
            self._file.flush()

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        super().close()


@contextlib.contextmanager
def _captured(lines: _Lines) -> Iterator[None]:
    """Standard output, standard error and what the root logger's handlers write go to `lines`."""
    handler_streams = []
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler_streams.append((handler, handler.setStream(lines)))
    try:
        with contextlib.redirect_stdout(lines), contextlib.redirect_stderr(lines):
            yield
    finally:
        for handler, stream in handler_streams:
            if stream is not None:
                handler.setStream(stream)


def run_locally(
    pipeline: Any,
    arguments: dict[str, Any],
    key: str,
    workdir: Path,
    access: HostAccess | None,
    on_task: Callable[[str, str | None], None],
    on_progress: Callable[[int, int, str], None],
    on_rows: Callable[[Path], None] = lambda rows: None,
) -> RunOutputs:
    """Run a DAG; what an earlier run in the workdir made of the same is taken from there (see `reuse`).

    Args:
        pipeline: the DAG.
        arguments: of the pipeline.
        key: of the run, by which its steps find one run in MLflow.
        workdir: where everything of the run is kept; absolute.
        access: what step containers share with this machine; None runs steps as processes.
        on_task: called with every step's display name when it starts, and why it does where an earlier run had
            such a step (`StepResults.why`); with None where its result is taken from an earlier run.
        on_progress: called with done, total and label of what a step counts.
        on_rows: called with the folder of the prepared rows when they are there.

    Returns:
        The artifacts of all steps of this run.

    Raises:
        InputError: a step refused its input.
        StepFailed: a step failed otherwise; the message ends with where to read on.
    """
    from kfp import local

    from spectraqlora_pipelines.local.containers import replace_kfps

    log = workdir / "run.log"
    local.init(
        local.DockerRunner() if access else local.SubprocessRunner(use_venv=False),
        pipeline_root=str(workdir / "artifacts"),
    )

    def listen(line: str) -> None:
        if match := _PROGRESS.match(line):
            on_progress(int(match[1]), int(match[2]), match[3])

    def look(step: str) -> None:
        if step == "prepare-data" and "rows" in outputs.steps[step]:
            on_rows(outputs.path(step, "rows"))

    lines = _Lines(log, listen)
    outputs = RunOutputs(workdir)
    try:
        in_containers = replace_kfps(access) if access else contextlib.nullcontext()

        def on_step(name: str, why: str | None) -> None:
            lines.begin(name)
            on_task(name, why)

        with (
            _steps_end_with_us(), _steps_know(key), in_containers,
            recorded(outputs, StepResults(workdir), on_step, look), _captured(lines),
            warnings.catch_warnings(action="ignore"),
        ):  # fmt: skip
            pipeline(**arguments)
    except InputError:
        raise
    except Exception as error:
        failed = outputs.failed or ""
        said = lines.outputs.get(failed, lines.outputs[""])
        if said.refusal is not None:
            raise _Relayed(said.refusal) from None
        reason = said.reason or " ".join(_ANSI.sub("", str(error)).split())
        raise StepFailed(f"{failed or 'the run'} failed: {reason} (read {log})") from error
    finally:
        lines.close()
    return outputs


class _Relayed(InputError):
    """An `InputError` that a step printed; its line is passed on as it is."""

    def __init__(self, line: str) -> None:
        Exception.__init__(self, line)
        if line.startswith(NoAnswer.prefix):
            self.exit_code = NoAnswer.exit_code
