"""A compiled pipeline, its nested ones opened: every step's task with what it is handed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml
from spectraqlora.settings import parse
from spectraqlora_pipelines.dags.catalogue import Dag, compile_dag


class Task(NamedTuple):
    """A step's task: its name for people, and for every artifact input the output that it is.

    `parameters` are the constants of its own arguments; `values` are all, as KFP resolves them: what comes from a
    step is its name.
    """

    step: str
    name: str
    reads: dict[str, str]
    parameters: dict[str, Any]
    values: dict[str, Any]
    command: list[str]
    document: dict[str, Any]


class Compiled:
    """A compiled pipeline, its nested ones opened."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.components = document["components"]
        self.executors = document["deploymentSpec"]["executors"]
        self.root = document["root"]["dag"]

    def tasks(self, arguments: dict[str, Any] | None = None) -> list[Task]:
        """All steps' tasks, of a run with these arguments."""
        declared = self.document["root"].get("inputDefinitions", {}).get("parameters", {})
        defaults = {name: spec["defaultValue"] for name, spec in declared.items() if "defaultValue" in spec}
        return list(self._tasks(self.root, {}, {**defaults, **(arguments or {})}))

    def _tasks(
        self, dag: dict[str, Any], given: dict[str, str], parameters: dict[str, Any]
    ) -> Iterator[Task]:
        for task in dag["tasks"].values():
            component = self.components[task["componentRef"]["name"]]
            inputs = task.get("inputs", {})
            reads = {
                name: self._source(dag, given, place) for name, place in inputs.get("artifacts", {}).items()
            }
            handed = {
                name: self._value(place, parameters) for name, place in inputs.get("parameters", {}).items()
            }
            if "dag" in component:
                yield from self._tasks(component["dag"], reads, handed)
                continue
            constants = {
                name: value["runtimeValue"]["constant"]
                for name, value in inputs.get("parameters", {}).items()
                if "runtimeValue" in value
            }
            declared = component.get("inputDefinitions", {}).get("parameters", {})
            defaults = {
                name: spec["defaultValue"] for name, spec in declared.items() if "defaultValue" in spec
            }
            container = self.executors[component["executorLabel"]]["container"]
            yield Task(
                self._step(component),
                task["taskInfo"]["name"],
                reads,
                constants,
                {**defaults, **{name: value for name, value in handed.items() if name in declared}},
                [*container["command"], *container["args"]],
                task,
            )

    def step_of(self, label: str) -> str:
        """The step that an executor runs."""
        arguments = self.executors[label]["container"]["args"]
        return str(arguments[arguments.index("--function_to_execute") + 1]).replace("_", "-")

    def _step(self, component: dict[str, Any]) -> str:
        return self.step_of(component["executorLabel"])

    def _value(self, place: dict[str, Any], parameters: dict[str, Any]) -> Any:
        if "runtimeValue" in place:
            return place["runtimeValue"]["constant"]
        if "componentInputParameter" in place:
            return parameters[place["componentInputParameter"]]
        if "taskFinalStatus" in place:
            return {"state": "COMPLETE", "pipelineTaskName": place["taskFinalStatus"]["producerTask"]}
        output = place["taskOutputParameter"]
        return f"{output['producerTask']}.{output['outputParameterKey']}"

    def _source(self, dag: dict[str, Any], given: dict[str, str], place: dict[str, Any]) -> str:
        if "componentInputArtifact" in place:
            return given[place["componentInputArtifact"]]
        output = place["taskOutputArtifact"]
        return self._output(dag, output["producerTask"], output["outputArtifactKey"])

    def _output(self, dag: dict[str, Any], task: str, key: str) -> str:
        component = self.components[dag["tasks"][task]["componentRef"]["name"]]
        if "dag" not in component:
            return f"{self._step(component)}.{key}"
        (selector,) = component["dag"]["outputs"]["artifacts"][key]["artifactSelectors"]
        return self._output(component["dag"], selector["producerSubtask"], selector["outputArtifactKey"])


def compiled_from(kind: Dag, values: dict[str, Any]) -> Compiled:
    """The pipeline that these settings compile to."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "pipeline.yaml"
        compile_dag(path, kind, parse(values))
        return Compiled(next(yaml.safe_load_all(path.read_text())))
