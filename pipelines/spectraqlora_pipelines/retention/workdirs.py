"""What can go in the work directories of local runs: what the latest finished run there does not use."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from spectraqlora.artifacts import SCHEMA_VERSION
from spectraqlora.errors import InputError
from spectraqlora.tracking.needs import NeededVersion, Needs

from spectraqlora_pipelines.local.outputs import FILE, read_outputs
from spectraqlora_pipelines.local.preflight import LOCK
from spectraqlora_pipelines.local.reuse import FOLDER as RESULTS
from spectraqlora_pipelines.local.reuse import StepResults
from spectraqlora_pipelines.retention.plan import Entry, Guard, Plan

RUN = "run.json"
CHECKPOINTS = "checkpoints"
FOREIGN = "no work directory of a run"
OTHER_VERSION = "of another version of this program, which knows what is in it"
UNDER_WAY = "a run works there"
USED = "the latest finished run uses it"
UNFINISHED = "of a run that has not finished, and takes it up"


@dataclass(frozen=True)
class Measured:
    """Bytes of a file or folder whose removal frees them, and when any of it was written last."""

    size: int
    modified: float


def measured(place: Path) -> Measured:
    """Size and age; a file that has a second name elsewhere frees nothing."""
    paths = [place, *place.rglob("*")] if place.is_dir() and not place.is_symlink() else [place]
    size, modified = 0, 0.0
    for path in paths:
        with contextlib.suppress(OSError):  # It went meanwhile.
            facts = path.lstat()
            if not path.is_dir():
                size += facts.st_size if facts.st_nlink == 1 else 0
            # A folder's own time is that of the last file that came or went.
            modified = max(modified, facts.st_mtime)
    return Measured(size, modified)


def remove(place: Path) -> None:
    """Remove a file, a link or a folder.

    Raises:
        InputError: the system refuses.
    """
    try:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    except OSError as error:
        raise InputError("file", place, f"one that may be removed ({error.strerror})") from None


def workdirs(place: Path) -> list[Path]:
    """A work directory, or those right in a folder.

    Raises:
        InputError: there is no such folder.
    """
    if not place.is_dir():
        raise InputError("PLACE", place, "a work directory, a folder of such, or an s3:// address")
    if (place / RUN).is_file():
        return [place]
    return sorted(path for path in place.iterdir() if path.is_dir())


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[bool]:
    """Whether no run works in a work directory; inside, none can begin to."""
    file: IO[str] | None = None
    try:
        file = open(workdir / LOCK, encoding="utf-8")  # noqa: SIM115 - closed below
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except FileNotFoundError:
        yield True  # Nothing that locks has worked there.
    except BlockingIOError:
        yield False
    finally:
        if file is not None:
            file.close()


def plan_workdir(
    plan: Plan, workdir: Path, ask: Callable[[Path, dict[str, Any]], Needs], guard: Guard
) -> None:
    """Add what can go in a work directory, and what stays.

    Args:
        plan: what is added to.
        workdir: absolute.
        ask: what the MLflow of a work directory with these settings says.
        guard: what is too young to go.

    Raises:
        InputError: that MLflow does not answer.
    """
    settings = _settings(workdir)
    if settings is None:
        reason = OTHER_VERSION if (workdir / RUN).is_file() else FOREIGN
        plan.keep(workdir, measured(workdir).size, reason)
        return
    with _alone(workdir) as alone:
        if not alone:
            plan.keep(workdir, measured(workdir).size, UNDER_WAY)
            return
        _Workdir(workdir, ask(workdir, settings), guard).add_to(plan)


def _settings(workdir: Path) -> dict[str, Any] | None:
    """Settings of the run; None where there is none, or another version's."""
    try:
        document = json.loads((workdir / RUN).read_text(encoding="utf-8"))
        settings = document["settings"]
        return settings if document["artifacts"] == SCHEMA_VERSION and isinstance(settings, dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class _Workdir:
    def __init__(self, workdir: Path, needs: Needs, guard: Guard) -> None:
        self._workdir, self._guard = workdir, guard
        self._artifacts = workdir / "artifacts"
        self._finished, self._used = 0.0, set[Path]()
        with contextlib.suppress(InputError, OSError):
            outputs = read_outputs(workdir)
            self._finished = (workdir / FILE).stat().st_mtime
            self._used = {_task(path) for step in outputs.steps.values() for path in step.values()}
        self._exports: dict[Path, NeededVersion] = {
            _task(Path(version.export)): version
            for version in needs.versions
            if version.export.startswith("/")
        }
        self._cached = {_task(path) for path in StepResults(workdir).artifacts()}

    def add_to(self, plan: Plan) -> None:
        """Sort everything of the work directory."""
        for run in sorted(path for path in self._artifacts.glob("*") if path.is_dir()):
            if run.name == CHECKPOINTS:
                for training in sorted(run.iterdir()):
                    self._add_checkpoints(plan, training)
            elif run.name != RESULTS:
                for task in sorted(run.iterdir()):
                    self._add_task(plan, task)
        for left in [*self._workdir.glob("*.partial"), *self._workdir.glob("scratch")]:
            self._add(plan, left, "a temporary folder", "left by a run that was killed")

    def _add_task(self, plan: Plan, task: Path) -> None:
        found, resolved = measured(task), task.resolve()
        version = self._exports.get(resolved)
        if resolved in self._used:
            plan.keep(task, found.size, USED)
        elif version is not None:
            plan.keep(task, found.size, f"the export of {version.name} version {version.number}")
        elif found.modified > self._finished and resolved in self._cached:
            plan.keep(task, found.size, UNFINISHED)
        elif found.modified > self._finished:
            self._add(plan, task, "artifacts of a step", "left by an attempt that did not finish")
        else:
            self._add(plan, task, "artifacts of a step", "the latest finished run does not use them")

    def _add_checkpoints(self, plan: Plan, training: Path) -> None:
        finished = measured(training).modified <= self._finished
        reason = "the run is finished" if finished else "nobody took up this training since"
        self._add(plan, training, "checkpoints", reason)

    def _add(self, plan: Plan, place: Path, what: str, reason: str) -> None:
        found = measured(place)
        if self._guard.young(found.modified):
            plan.keep(place, found.size, self._guard.reason)
        else:
            removal = partial(_remove_alone, self._workdir, place)
            plan.remove(Entry(what, str(place), found.size, found.modified, reason, removal))


def _remove_alone(workdir: Path, place: Path) -> None:
    with _alone(workdir) as alone:
        if not alone:
            raise InputError("PLACE", workdir, "a work directory in which no run works; one has begun")
        remove(place)


def _task(artifact: Path) -> Path:
    """The folder of the step that an artifact is of, by the name that it has without links."""
    return artifact.parent.resolve()
