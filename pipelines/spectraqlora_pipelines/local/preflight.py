"""What can be refused is refused here, in seconds, before any step starts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectraqlora import __version__
from spectraqlora.artifacts import SCHEMA_VERSION
from spectraqlora.errors import InputError
from spectraqlora.files import check_output, write_text
from spectraqlora.places import Place, file_place, joined_contents, parted_contents
from spectraqlora.runtime.console import quiet
from spectraqlora.runtime.disk import ask, shown
from spectraqlora.settings import DataSettings, Settings
from spectraqlora.signing import REQUIRED, check_signing, trusted_key

from spectraqlora_pipelines.local.reuse import FOLDER as RESULTS
from spectraqlora_pipelines.local.reuse import StepResults

if TYPE_CHECKING:
    from spectraqlora.planning.disk import StepDisk

MINIMUM_FREE_BYTES = 512 * 2**20
LOCK = ".lock"
"""File of a work directory that the run there holds locked."""


def check(settings: Settings, base: Place, sources: Sequence[Place], commit: str = "") -> list[str]:
    """Refuse bad data, bad base models, servers that do not answer, and ranks and processes that do not fit.

    Args:
        settings: of the run.
        base: base model.
        sources: data.
        commit: of the base model on the hub; empty where it is not there.

    Returns:
        Lines about what of the base model is not taken as it stands, and about rows that its template refuses, where it
        takes others.
    """
    if settings.train.nodes > 1:
        raise InputError(
            "train.nodes",
            settings.train.nodes,
            "1 on this machine, where train.processes counts its processes; `submit` trains on several machines",
        )
    _check_promotion(settings, base)
    if settings.tracking.uri:
        from spectraqlora.tracking.registry import Registry

        Registry(settings.tracking).versions()
    _check_destinations(settings)
    check_signing(settings.export)
    trusted_key()
    if settings.train.processes > 1:
        from spectraqlora.steps.train.distributed import split_batch

        split_batch(settings.train, settings.train.processes)
    lines = [f"Base model: {text}" for text in _check_base_model(settings, base, commit)]
    with quiet():
        return lines + [f"Data: {text}" for text in _check_data(settings, base, sources, commit)]


def _check_data(settings: Settings, base: Place, sources: Sequence[Place], commit: str) -> list[str]:
    """Refuse data that cannot be read, or that the base model's template refuses."""
    from spectraqlora.data.checks import check_sources
    from spectraqlora.data.for_model import description_of, row_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = description_of(base, Path(scratch) / "description", commit)
        return check_sources(sources, settings.data, row_model(folder, settings.data, base.trusted))


def _check_promotion(settings: Settings, base: Place) -> None:
    settings.promote.check_measured()
    if settings.promote.guard_data:
        from spectraqlora.steps.promote.rescore import guard_file

        guard_file(settings.promote.guard_data)
    if settings.tracking.registered_form == "adapter" and settings.export.signature == REQUIRED:
        raise InputError(
            "export.signature",
            REQUIRED,
            "tracking.registered_form=merged; an adapter's version is not signed",
        )
    if settings.tracking.registered_form == "adapter" and base.kind == "s3":
        raise InputError(
            "tracking.registered_form",
            "adapter",
            f"merged; transformers cannot load a reference to {base}",
        )


def _check_base_model(settings: Settings, base: Place, commit: str) -> list[str]:
    """Refuse models that are no base for training, or that the settings do not fit; headers and configs are read."""
    from spectraqlora.methods.catalogue import method
    from spectraqlora.models.inspection import inspect_base

    with quiet():
        inspection = inspect_base(base, commit)
    for name in settings.methods:
        method(name).check(inspection.modules, settings.select)
    if settings.snr.table:
        from spectraqlora.snr.table import read_given
        from spectraqlora.steps.snr_analyze.analyze import given_table

        with quiet():
            read_given(given_table(settings.snr.table), inspection.modules)
    return inspection.lines


def memory_warning(settings: Settings, base: Place) -> str:
    """A line where a step may take more memory than this machine, or its GPU, has; empty where all fit.

    No refusal: the plan's figures are upper bounds, and those of unusual models may be far off. A model at an
    address is not planned.

    Raises:
        InputError: the hub has no such model or cannot be reached, or it is no language model.
    """
    if base.kind == "s3":
        return ""
    from spectraqlora.models.hardware import gpu_memory_bytes
    from spectraqlora.planning.steps import GIB, plan_for

    gpu = gpu_memory_bytes()
    try:
        with quiet(), warnings.catch_warnings(action="ignore"):
            plan, free = plan_for(base.text, settings, gpu)
    except InputError:
        raise
    except Exception as error:  # of the model's own code, which runs on tensors without content
        return f"Memory: what this model takes could not be planned ({type(error).__name__})"
    most = max(plan.steps, key=lambda memory: memory.device)
    if most.device <= free:
        return ""
    return (
        f"Memory: {most.label} takes up to {most.device / GIB:.1f} GiB of the {free / GIB:.1f} GiB that "
        f"{'the GPU' if gpu else 'this machine'} has; the command plan, given the same settings, says what to change"
    )


def check_disk(
    settings: Settings, base: Place, sources: Sequence[Place], workdir: Path, fresh: bool = False
) -> None:
    """Refuse a run whose steps write more than the workdir's disk has left.

    Steps that finished there before are not counted: what they wrote may be reused. A model at an address is not
    planned.

    Raises:
        InputError: less is left than the others take, or than 512 MiB.
    """
    from spectraqlora.planning.disk import most

    finished = set() if fresh else StepResults(workdir).finished()
    steps = [step for step in disk_steps(settings, base, sources) if step.step not in finished]
    largest = max(steps, key=lambda step: step.kept, default=None)
    needed = MINIMUM_FREE_BYTES
    what = "a run"
    if largest is not None and most(tuple(steps)) > needed:
        needed = most(tuple(steps))
        what = f"the run, {shown(largest.kept)} of it for {largest.step}; the command plan shows all"
    ask(workdir, needed, what)


def disk_steps(settings: Settings, base: Place, sources: Sequence[Place]) -> tuple[StepDisk, ...]:
    """What the steps of a run write; nothing where the model cannot be planned, which `memory_warning` says."""
    if base.kind == "s3":
        return ()
    from spectraqlora.models.hardware import gpu_memory_bytes
    from spectraqlora.planning.disk import disk
    from spectraqlora.planning.steps import shape_of

    with (
        quiet(),
        warnings.catch_warnings(action="ignore"),
        contextlib.suppress(AttributeError, KeyError, TypeError),
    ):
        return disk(shape_of(base.text, settings, gpu_memory_bytes() > 0), settings, sum(map(_size, sources)))
    return ()


def _size(source: Place) -> int:
    """Bytes of data that is on this machine."""
    if source.kind != "path":
        return 0
    files = [source.path] if source.path.is_file() else source.path.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def _check_destinations(settings: Settings) -> None:
    from spectraqlora.storage import check_writable, parse_address

    if settings.checkpoint.folder:
        check_output(Path(settings.checkpoint.folder).expanduser(), "checkpoint.folder", folder=True)
    for section in ("checkpoint", "export"):
        destination = getattr(settings, section).destination
        if destination:
            check_writable(parse_address(destination, f"{section}.destination"))


def commits(
    settings: Settings, base: Place, sources: Sequence[Place], workdir: Path, fresh: bool = False
) -> dict[str, str]:
    """The commits of what a run takes from the hub, before anything else is asked of it; those of the data joined.

    A hub id keeps the commit that it was pinned to by the first run in the workdir, whatever its branch is at now;
    not where the workdir starts over.

    Raises:
        InputError: the hub has no such thing.
    """
    pinned = {} if fresh else _pinned(settings, workdir)
    found = {}
    if base.kind == "hub":
        found["base_model"] = pinned.get("base_model") or base.digest(offline=True)
    if any(place.kind == "hub" for place in sources):
        known = parted_contents(pinned.get("data", ""), len(sources))
        found["data"] = joined_contents(
            [
                (pin or place.digest(offline=True)) if place.kind == "hub" else ""
                for pin, place in zip(known, sources, strict=True)
            ]
        )
    return found


def contents(
    settings: Settings,
    base: Place,
    sources: Sequence[Place],
    workdir: Path,
    pins: dict[str, str] | None = None,
) -> dict[str, str]:
    """Digests of a run's inputs, so that what changed is not taken from an earlier run.

    Args:
        settings: of the run.
        base: base model.
        sources: data.
        workdir: of the run.
        pins: what `commits` said; None asks it.

    Raises:
        InputError: the hub, or the store, has no such thing.
    """
    pins = commits(settings, base, sources, workdir) if pins is None else pins
    data = parted_contents(pins.get("data", ""), len(sources))
    digests = {
        "base_model": pins.get("base_model") or base.digest(offline=True),
        "data": joined_contents(
            [pin or place.digest(offline=True) for pin, place in zip(data, sources, strict=True)]
        ),
    }
    if settings.snr.table:
        digests["snr_table"] = file_place(settings.snr.table, "snr.table").digest()
    return digests


def _pinned(settings: Settings, workdir: Path) -> dict[str, str]:
    """What the run that a workdir holds took from places that these settings name, too."""
    try:
        earlier = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
        before, held = earlier["settings"], dict(earlier["contents"])
        same = {
            "base_model": before["model"]["base_model"] == settings.model.base_model
            and before["model"]["revision"] == settings.model.revision,
            "data": DataSettings(**before["data"]).named == settings.data.named,
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: value for name, value in held.items() if same.get(name)}


class WorkdirLock:
    """A work directory as one run's own, until this is closed or the process ends, however it ends.

    Args:
        workdir: the folder; it is made.

    Raises:
        InputError: another run works there, or the folder cannot be written.
    """

    def __init__(self, workdir: Path) -> None:
        path = workdir / LOCK
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as the run works
        except OSError as error:
            raise InputError(
                "--workdir", workdir, f"a folder that can be written ({error.strerror})"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise InputError(
                "--workdir", workdir, f"a folder in which no other run works; {owner} does"
            ) from None
        self._file.truncate(0)
        self._file.write(f"a run (pid {os.getpid()} on {socket.gethostname()})\n")
        self._file.flush()

    def close(self) -> None:
        """Let others work there."""
        self._file.close()


def claim_workdir(
    workdir: Path,
    settings: Settings,
    contents: dict[str, str],
    pipeline: str = "ablation",
    fresh: bool = False,
) -> WorkdirLock:
    """Make the workdir this run's own.

    Args:
        workdir: the folder.
        settings: of the run.
        contents: digests of what it reads.
        pipeline: name of the DAG.
        fresh: whether nothing of earlier runs is taken up.

    Returns:
        The lock that keeps other runs out.

    Raises:
        InputError: it holds a run of another version, another run works there, or it is a file or a foreign folder.
    """
    check_output(workdir, "--workdir", folder=True)
    identity: dict[str, object] = {
        "version": __version__,
        "artifacts": SCHEMA_VERSION,
        "settings": settings.model_dump(mode="json"),
        "contents": contents,
        "pipeline": pipeline,
    }
    stored = workdir / "run.json"
    if not stored.exists() and workdir.is_dir() and any(path.name != LOCK for path in workdir.iterdir()):
        raise InputError("--workdir", workdir, "an empty or new folder, or one that holds a run")
    lock = WorkdirLock(workdir)
    try:
        if fresh:
            _start_over(workdir)
        elif stored.exists():
            _check_version(stored, identity)
        _claim(stored, identity)
    except InputError:
        lock.close()
        raise
    return lock


def _start_over(workdir: Path) -> None:
    """Forget which steps finished, and remove the checkpoints; the command gc removes what nobody needs then."""
    try:
        for name in (RESULTS, "checkpoints"):
            if (workdir / "artifacts" / name).exists():
                shutil.rmtree(workdir / "artifacts" / name)
    except OSError as error:
        raise InputError("--fresh", error.filename, f"files that may be removed ({error.strerror})") from None


def _check_version(stored: Path, identity: dict[str, object]) -> None:
    """Refuse a run that another version made."""
    try:
        before = json.loads(stored.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError("--workdir", stored.parent, "a readable run.json, or --fresh") from None
    if not isinstance(before, dict) or any(before.get(k, 1) != identity[k] for k in ("version", "artifacts")):
        raise InputError(
            "--workdir",
            stored.parent,
            "a new folder, or --fresh; this one holds a run of another version, such as 0.1.0, to be made anew",
        )


def _claim(stored: Path, identity: dict[str, object]) -> None:
    """Write what the workdir's run is."""
    workdir = stored.parent
    try:
        write_text(stored, json.dumps(identity, indent=1))
    except OSError as error:
        raise InputError("--workdir", workdir, f"a folder that can be written ({error.strerror})") from None
