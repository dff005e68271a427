"""What the steps of one local run wrote, or took from an earlier run.

kfp.local returns a pipeline's declared outputs only, and none from inside a condition. `recorded` therefore
listens at the one function through which kfp.local runs every task.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectraqlora import __version__
from spectraqlora.errors import InputError
from spectraqlora.files import write_text

from spectraqlora_pipelines.local.reuse import StepResults

FILE = "outputs.json"
"""Name of the record in a work directory."""


@dataclass(frozen=True)
class RunOutputs:
    """Where the artifacts of one run are.

    Args:
        workdir: of the run; the record holds paths relative to it, so that it can be moved.
        steps: by a task's display name, such as "train (hybrid, round 1)": artifacts by name.
        failures: display names of the tasks that failed, in that order.
    """

    workdir: Path
    steps: dict[str, dict[str, Path]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def failed(self) -> str | None:
        """The task that failed first; None where none did."""
        return self.failures[0] if self.failures else None

    def path(self, step: str, artifact: str) -> Path:
        """Folder, or file, of a step's artifact.

        Raises:
            InputError: this run has none, or it is there no longer.
        """
        place = self.steps.get(step, {}).get(artifact)
        if place is None or not place.exists():
            raise InputError("workdir", self.workdir, f"a finished run; {artifact} of {step} is not there")
        return place

    def write(self) -> None:
        """Record the run as the work directory's latest, in `outputs.json`."""
        steps = {
            step: {name: str(path.relative_to(self.workdir)) for name, path in artifacts.items()}
            for step, artifacts in self.steps.items()
        }
        write_text(self.workdir / FILE, json.dumps({"version": __version__, "steps": steps}, indent=1))


def read_outputs(workdir: Path) -> RunOutputs:
    """The record of the work directory's latest run.

    Raises:
        InputError: no run finished there.
    """
    try:
        steps = json.loads((workdir / FILE).read_text(encoding="utf-8"))["steps"]
        paths = {
            step: {name: workdir / path for name, path in artifacts.items()}
            for step, artifacts in steps.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            "WORKDIR", workdir, f"the workdir of a finished run, with a readable {FILE}"
        ) from None
    return RunOutputs(workdir, paths)


@contextlib.contextmanager
def recorded(
    outputs: RunOutputs,
    results: StepResults,
    on_task: Callable[[str, str | None], None],
    on_written: Callable[[str], None] = lambda name: None,
) -> Iterator[None]:
    """Record the outputs of every task that kfp.local runs inside, and run none whose result is at hand.

    Args:
        outputs: filled as tasks succeed.
        results: of earlier runs; those of this one are added.
        on_task: called with every task's display name when it starts, with what `StepResults.why` says of it; with
            None where its result is taken from an earlier run.
        on_written: called with the same name when its outputs are recorded.
    """
    from kfp import dsl
    from kfp.local.orchestrator import task_executor
    from kfp.local.status import Status

    kfps = task_executor.execute_single_task

    def execute(task_name: str, task_spec: Any, **given: Any) -> Any:
        name = task_spec.task_info.name or task_name
        work = results.asked(name, task_spec, given["components"], given["executors"], given["io_store"])
        written, status = results.find(work), Status.SUCCESS
        if written is not None:
            on_task(name, None)
        else:
            on_task(name, results.why(work))
            try:
                written, status = kfps(task_name=task_name, task_spec=task_spec, **given)
            except Exception:
                outputs.failures.append(name)
                raise
            if status == Status.SUCCESS:
                results.keep(work, written)
            else:
                outputs.failures.append(name)
        outputs.steps[name] = {
            key: Path(value.uri) for key, value in written.items() if isinstance(value, dsl.Artifact)
        }
        on_written(name)
        return written, status

    task_executor.execute_single_task = execute
    try:
        yield
    finally:
        task_executor.execute_single_task = kfps
