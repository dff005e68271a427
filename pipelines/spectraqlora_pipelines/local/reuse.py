"""Which steps a run takes from an earlier one in its work directory, and why it does not take others.

A step's result is known by what it was made from: the step, its command, its parameters and the content of the artifacts
that it reads. A changed setting so runs the steps that read it, and what comes after them only where they wrote something
else. KFP's own local cache knows artifacts by where they are and tasks by where the compiler put them: a work directory
that was moved, or one method more, would take nothing from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectraqlora import __version__
from spectraqlora.artifacts import SCHEMA_VERSION
from spectraqlora.files import file_digest, folder_digest, write_text
from spectraqlora.methods.catalogue import method
from spectraqlora.runtime.cache import plainly_named
from spectraqlora.settings import SelectSettings

FOLDER = ".steps"
"""Below a work directory's artifacts: a record of each step that finished there."""
_HERE = "<workdir>"
_WITHOUT_EFFECT = ("checkpoint_settings",)
"""Parameters that change how a step works, and nothing of what it writes."""
_SETTINGS = "_settings"
_NAMES = {"base_model": "model.base_model", "source": "data.source"}
_CONTENT_OF = {"quantize-load": "model.base_model", "prepare-data": "data.source", "snr-analyze": "snr.table"}
_CONTENT = "content "
_SHOWN = 60
"""Most characters of a value in a reason."""


@dataclass(frozen=True)
class Work:
    """A step that a run asks for.

    Args:
        step: display name of its task.
        cached: whether its result may come from an earlier run.
        command: what runs, as the pipeline says it.
        arguments: by setting or artifact, flat: values, and digests of artifacts.
        also: arguments of other work whose result serves as well.
    """

    step: str
    cached: bool
    command: list[str]
    arguments: dict[str, Any]
    also: tuple[dict[str, Any], ...] = ()

    def digests(self) -> list[str]:
        """Under which a result that serves may be kept, its own first."""
        return [self._key(arguments) for arguments in (self.arguments, *self.also)]

    def _key(self, arguments: dict[str, Any]) -> str:
        identity = [__version__, SCHEMA_VERSION, self.step, self.command, arguments]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class StepResults:
    """The results of the steps that finished in a work directory.

    Args:
        workdir: absolute; entries hold paths relative to it, so that it can be moved.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self._folder = workdir / "artifacts" / FOLDER
        self._names = sorted({str(workdir), str(plainly_named(workdir))}, key=len, reverse=True)
        self._lock = threading.Lock()
        self._asked_why = False

    def asked(self, step: str, task: Any, components: Any, executors: Any, io_store: Any) -> Work:
        """The work that a task of kfp.local stands for.

        Args:
            step: its display name.
            task: its specification.
            components: of the pipeline.
            executors: of the pipeline.
            io_store: what the tasks before it wrote.
        """
        from kfp.local.orchestrator.orchestrator_utils import OrchestratorUtils

        container = executors[components[task.component_ref.name].executor_label].container
        command = [container.image, *container.command, *container.args]
        cached = task.caching_options.enable_cache
        given = OrchestratorUtils.make_task_arguments(task_inputs_spec=task.inputs, io_store=io_store)
        flat: dict[str, Any] = {}
        for name, value in given.items() if cached else ():
            if name not in _WITHOUT_EFFECT:
                flat |= self._flat(_setting(step, name), value)
        also: tuple[dict[str, Any], ...] = ()
        if step == "measure-base" and cached:
            flat, also = _measured_for(flat, given)
        return Work(step, cached, command, flat, also)

    def find(self, work: Work) -> dict[str, Any] | None:
        """What an earlier run's step wrote that did the same work; None where there is none, or it is gone."""
        if not work.cached:
            return None
        for key in work.digests():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                entry = self._folder / f"{key}.json"
                stored = json.loads(entry.read_text(encoding="utf-8"))["outputs"]
                outputs = {name: self._restored(value) for name, value in stored.items()}
                entry.touch()
                return outputs
        return None

    def finished(self) -> set[str]:
        """The steps, without method and round, that have finished here."""
        return {entry["step"].partition(" (")[0] for entry in self._earlier()}

    def artifacts(self) -> Iterator[Path]:
        """What the steps that finished here wrote, and a later run may take."""
        for entry in self._earlier():
            for output in entry["outputs"].values():
                if "path" in output:
                    yield self.workdir / output["path"]

    def keep(self, work: Work, outputs: dict[str, Any]) -> None:
        """Remember what a step wrote. A full disk is left to whoever needs it: the step then runs again."""
        if not work.cached:
            return
        entry = {
            "step": work.step,
            "arguments": work.arguments,
            "outputs": {name: self._stored(value) for name, value in outputs.items()},
        }
        with contextlib.suppress(OSError):
            write_text(self._folder / f"{work.digests()[0]}.json", json.dumps(entry, indent=1))

    def why(self, work: Work) -> str:
        """Why a step is not taken from an earlier run, where it is a run's first such step; else nothing."""
        with self._lock:
            if not work.cached or self._asked_why:
                return ""
            self._asked_why = True
        earlier = self._earlier()
        if not earlier:
            return ""
        same = [entry for entry in earlier if entry["step"] == work.step]
        if not same:
            return "it has not finished here before"
        before, now = same[-1]["arguments"], work.arguments
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if not changed:
            return "its result is not there any more, or the step itself is another"
        more = f" ({len(changed) - 1} more changed)" if len(changed) > 1 else ""
        return _change(changed[0], before, now) + more

    def _earlier(self) -> list[dict[str, Any]]:
        """Entries of all steps that finished here, those of the latest run last."""
        entries = []
        for path in sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                entry = json.loads(path.read_text(encoding="utf-8"))
                entries.append({key: entry[key] for key in ("step", "arguments", "outputs")})
        return entries

    def _flat(self, name: str, value: Any) -> dict[str, Any]:
        """Values by setting; an artifact is its content."""
        if hasattr(value, "uri"):
            return {name: f"{_CONTENT}{self._digest(Path(value.uri))}"}
        if isinstance(value, dict) and value:
            flat: dict[str, Any] = {}
            for key, inner in value.items():
                flat |= self._flat(f"{name}.{key}" if name else str(key), inner)
            return flat
        if isinstance(value, str):
            for here in self._names:
                value = value.replace(here, _HERE)
        # A whole number is the same, whether KFP handed it on as a float or not.
        return {name: int(value) if isinstance(value, float) and value.is_integer() else value}

    @staticmethod
    def _digest(artifact: Path) -> str:
        """Digest of an artifact's content, taken once and kept beside it: a finished step's artifact stays as it is."""
        beside = artifact.with_name(f"{artifact.name}.sha256")
        with contextlib.suppress(OSError):
            return beside.read_text(encoding="utf-8")
        digest = folder_digest(artifact) if artifact.is_dir() else file_digest(artifact)
        with contextlib.suppress(OSError):
            write_text(beside, digest)
        return digest

    def _stored(self, value: Any) -> Any:
        if not hasattr(value, "uri"):
            return {"value": value}
        place = str(Path(value.uri).relative_to(self.workdir))
        return {
            "path": place,
            "name": value.name,
            "type": {"schemaTitle": value.schema_title, "schemaVersion": value.schema_version},
            "metadata": value.metadata,
        }

    def _restored(self, stored: dict[str, Any]) -> Any:
        """A stored output; raises FileNotFoundError where an artifact is gone."""
        if "path" not in stored:
            return stored["value"]
        from kfp.dsl.executor import create_artifact_instance

        path = self.workdir / stored["path"]
        path.stat()
        return create_artifact_instance({**stored, "uri": str(path)})


def _setting(step: str, parameter: str) -> str:
    """What a step's parameter is called in the settings."""
    if parameter == "content":
        return f"content of {_CONTENT_OF.get(step, step)}"
    return _NAMES.get(parameter, parameter.removesuffix(_SETTINGS))


def _measured_for(
    flat: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """measure-base's arguments, of its methods only whether gradients are measured; and others that serve as well.

    Gradients are those of all modules, for whichever methods: a measurement with them serves those that need none.
    """
    select = SelectSettings(**given["select_settings"])
    measures = any(method(name).measures_gradients(select) for name in given["methods"].split(","))
    without, with_gradients = ({**flat, "methods": f"{some} measures gradients"} for some in ("none", "one"))
    return (with_gradients, ()) if measures else (without, (with_gradients,))


def _change(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """How a setting or an input differs, in words."""
    if key not in now:
        return f"{key} is left out"
    if key not in before:
        return f"{key} is new"
    if str(now[key]).startswith(_CONTENT):
        return f"{key} has other content"
    return f"{key} was {_shown(before[key])} and is now {_shown(now[key])}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
