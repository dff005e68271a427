"""A compiled pipeline as Argo Workflows runs it without Kubeflow Pipelines: a WorkflowTemplate.

The DAG is the one that KFP's compiler wrote: a nested pipeline becomes a DAG template, a condition a task's `when`, an
exit task the workflow's exit hook. A step is a container that runs its image's own command line, on folders that Argo
fills and takes. KFP's cache, artifact metadata and lineage have no counterpart here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from spectraqlora.errors import InputError
from spectraqlora.settings import Settings

from spectraqlora_pipelines.cluster.argo_pods import INPUTS, OUTPUTS, pod_of, run_of
from spectraqlora_pipelines.cluster.progress import in_order, is_exit_task
from spectraqlora_pipelines.cluster.values import ClusterValues
from spectraqlora_pipelines.dags.catalogue import Dag, compile_dag

API = "argoproj.io/v1alpha1"
TEMPLATE = "WorkflowTemplate"
_CHANNEL = "pipelinechannel--"
"""What KFP puts before the names of values that it passes into a condition or an exit handler."""
_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
_CONDITION = re.compile(r"inputs\.parameter_values\['([^']+)'\] (==|!=) '([^']*)'")


def template_for(kind: Dag, settings: Settings, values: ClusterValues, name: str = "") -> dict[str, Any]:
    """The WorkflowTemplate of a pipeline.

    Args:
        kind: ablation or retraining.
        settings: what is compiled.
        values: how its steps run.
        name: of the WorkflowTemplate; empty is the pipeline's own.
    """
    with TemporaryDirectory() as scratch:
        compiled = Path(scratch) / f"{kind}.yaml"
        compile_dag(compiled, kind, settings, ClusterValues())
        pipeline, _ = yaml.safe_load_all(compiled.read_text(encoding="utf-8"))
    return workflow_template(pipeline, values, name, settings.train.nodes)


def workflow_template(
    pipeline: dict[str, Any], values: ClusterValues, name: str = "", nodes: int = 1
) -> dict[str, Any]:
    """The WorkflowTemplate of a compiled pipeline, whose train steps have `nodes` machines train together."""
    return {
        "apiVersion": API,
        "kind": TEMPLATE,
        "metadata": {"name": name or pipeline["pipelineInfo"]["name"]},
        "spec": _Translation(pipeline, values, nodes).spec(),
    }


def read_template(path: Path) -> dict[str, Any]:
    """A WorkflowTemplate that `compile --target argo` wrote.

    Raises:
        InputError: it is something else.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        good = (document["apiVersion"], document["kind"]) == (API, TEMPLATE) and document["spec"]["templates"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError):
        good = False
    if not good:
        raise InputError(
            "--package", path, "a WorkflowTemplate written by `spectraqlora compile --target argo`"
        )
    return dict(document)


def texts(arguments: dict[str, Any]) -> list[dict[str, str]]:
    """A pipeline's arguments as a workflow takes them."""
    return [{"name": name, "value": text(value)} for name, value in arguments.items()]


def text(value: Any) -> str:
    """A value as the text of an Argo parameter: a text as it is, everything else as JSON, whole numbers without a point.

    Two braces inside a text of the JSON are written so that Argo does not take them for a reference of its own.
    """
    if isinstance(value, str):
        return value
    return json.dumps(_whole(value)).replace("{{", "{\\u007b")


def _whole(value: Any) -> Any:
    """Without the point that KFP's compiler gives to every number."""
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Translation:
    def __init__(self, pipeline: dict[str, Any], values: ClusterValues, nodes: int) -> None:
        self._pipeline, self._values, self._nodes = pipeline, values, nodes
        self._components = pipeline["components"]
        self._templates: dict[str, dict[str, Any]] = {}
        self._given: dict[tuple[str, str], dict[tuple[str, ...], str]] = {}

    def spec(self) -> dict[str, Any]:
        root, name = self._pipeline["root"], self._pipeline["pipelineInfo"]["name"]
        dag = root["dag"]
        self._dag(name, root, "workflow", "")
        spec: dict[str, Any] = {"entrypoint": name}
        for task in (task for task in dag["tasks"].values() if is_exit_task(task)):
            called = self._called(task, "workflow", "", {})
            spec["hooks"] = {"exit": {key: called[key] for key in ("template", "arguments")}}
        parameters = root.get("inputDefinitions", {}).get("parameters", {})
        given = {key: known["defaultValue"] for key, known in parameters.items() if "defaultValue" in known}
        return {
            **spec,
            "arguments": {"parameters": texts(given)},
            **run_of(self._values),
            "templates": list(self._templates.values()),
        }

    def _dag(self, name: str, component: dict[str, Any], scope: str, method: str) -> None:
        """Write the template of a DAG, and those of what it calls."""
        dag = component["dag"]
        made: dict[str, Any] = {"name": name}
        self._templates[name] = made
        interface = component.get("inputDefinitions", {})
        if scope == "inputs":
            made["inputs"] = {
                kind: [{"name": _short(key)} for key in interface[kind]]
                for kind in ("parameters", "artifacts")
                if interface.get(kind)
            }
        labels = {key: _slug(task["taskInfo"]["name"]) for key, task in dag["tasks"].items()}
        made["dag"] = {
            "tasks": [
                {"name": labels[key], **self._called(dag["tasks"][key], scope, method, labels)}
                for key in in_order(dag["tasks"])
                if not is_exit_task(dag["tasks"][key])
            ]
        }
        outputs = dag.get("outputs", {}).get("artifacts", {})
        if outputs:
            made["outputs"] = {
                "artifacts": [
                    {"name": key, "from": _output(labels, selector, "artifacts")}
                    for key, found in outputs.items()
                    for selector in found["artifactSelectors"]
                ]
            }

    def _called(
        self, task: dict[str, Any], scope: str, method: str, labels: dict[str, str]
    ) -> dict[str, Any]:
        """A task but for its name; what it calls gets its template."""
        key = task["componentRef"]["name"]
        component = self._components[key]
        inputs = task.get("inputs", {})
        handed = inputs.get("parameters", {})
        wanted = component.get("inputDefinitions", {}).get("parameters", {})
        if "dag" in component:
            template = _slug(task["taskInfo"]["name"])
            inner = handed.get("method", {}).get("runtimeValue", {}).get("constant", "") or method
            self._dag(template, component, "inputs", inner)
        else:
            given = tuple(sorted(inputs.get("artifacts", {})))
            template = self._step(component, given, method)
        parameters = [
            {"name": _short(name), "value": _value(place, handed, scope, labels)}
            for name, place in handed.items()
            if name in wanted
        ]
        artifacts = [
            {"name": name, "from": _artifact(place, scope, labels)}
            for name, place in inputs.get("artifacts", {}).items()
        ]
        called: dict[str, Any] = {"template": template}
        before = [labels[name] for name in task.get("dependentTasks", []) if name in labels]
        if before:
            called["dependencies"] = before
        condition = task.get("triggerPolicy", {}).get("condition")
        if condition:
            called["when"] = _when(condition, handed, scope, labels)
        arguments = {"parameters": parameters, "artifacts": artifacts}
        return {**called, "arguments": {kind: entries for kind, entries in arguments.items() if entries}}

    def _step(self, component: dict[str, Any], given: tuple[str, ...], method: str) -> str:
        """The name of a step's template, one for each set of artifacts that it is given: Argo has no optional ones."""
        step = self._step_of(component)
        variants = self._given.setdefault((step, method), {})
        if given in variants:
            return variants[given]
        first = next(iter(variants), given)
        more = ["with", *(name for name in given if name not in first)] if variants else []
        name = variants[given] = _slug(" ".join([step, method, *more]))
        interface, written = component.get("inputDefinitions", {}), component.get("outputDefinitions", {})
        values = interface.get("parameters", {})
        arguments = [
            *(part for name in values for part in (_flag(name), f"{{{{inputs.parameters.{name}}}}}")),
            *(part for name in given for part in (_flag(name), f"{INPUTS}/{name}")),
            *(
                part
                for kind in ("artifacts", "parameters")
                for name in written.get(kind, {})
                for part in (_flag(name), f"{OUTPUTS}/{name}")
            ),
        ]
        inputs = {
            "parameters": [
                {"name": name, **({"value": text(known["defaultValue"])} if "defaultValue" in known else {})}
                for name, known in values.items()
            ],
            "artifacts": [{"name": name, "path": f"{INPUTS}/{name}"} for name in given],
        }
        # Argo deletes a folder of S3 only where its key ends with a slash, which none does that Argo makes itself. The
        # rest of the location is the repository's, of whichever store.
        place = self._values.argo.repository.key_format.strip("/")
        outputs = {
            "parameters": [
                {"name": name, "valueFrom": {"path": f"{OUTPUTS}/{name}"}}
                for name in written.get("parameters", {})
            ],
            "artifacts": [
                {
                    "name": name,
                    "path": f"{OUTPUTS}/{name}",
                    "archive": {"none": {}},
                    "s3": {"key": f"{place}/{name}/"},
                }
                for name in written.get("artifacts", {})
            ],
        }
        self._templates[name] = {
            "name": name,
            "inputs": {kind: entries for kind, entries in inputs.items() if entries},
            "outputs": {kind: entries for kind, entries in outputs.items() if entries},
            **pod_of(step, method, arguments, self._values, self._nodes),
        }
        return name

    def _step_of(self, component: dict[str, Any]) -> str:
        arguments = self._pipeline["deploymentSpec"]["executors"][component["executorLabel"]]["container"][
            "args"
        ]
        return str(arguments[arguments.index("--function_to_execute") + 1]).replace("_", "-")


def _value(place: dict[str, Any], handed: dict[str, Any], scope: str, labels: dict[str, str]) -> str:
    """A parameter's value, or a reference to it."""
    if "componentInputParameter" in place:
        return f"{{{{{scope}.parameters.{_short(place['componentInputParameter'])}}}}}"
    if "taskOutputParameter" in place:
        found = place["taskOutputParameter"]
        return _reference(labels, found["producerTask"], "parameters", found["outputParameterKey"])
    if "taskFinalStatus" in place:
        return "{{workflow.status}}"

    def resolved(match: re.Match[str]) -> str:
        return _value(handed[match[1]], handed, scope, labels)

    constant = place["runtimeValue"]["constant"]
    if isinstance(constant, dict):
        return json.dumps(
            {key: _PLACEHOLDER.sub(resolved, value) if isinstance(value, str) else _whole(value)
             for key, value in constant.items()}
        )  # fmt: skip
    return _PLACEHOLDER.sub(resolved, constant) if isinstance(constant, str) else text(constant)


def _artifact(place: dict[str, Any], scope: str, labels: dict[str, str]) -> str:
    if "componentInputArtifact" in place:
        return f"{{{{{scope}.artifacts.{place['componentInputArtifact']}}}}}"
    found = place["taskOutputArtifact"]
    return _reference(labels, found["producerTask"], "artifacts", found["outputArtifactKey"])


def _output(labels: dict[str, str], selector: dict[str, Any], kind: str) -> str:
    return _reference(labels, selector["producerSubtask"], kind, selector["outputArtifactKey"])


def _reference(labels: dict[str, str], task: str, kind: str, key: str) -> str:
    return f"{{{{tasks.{labels[task]}.outputs.{kind}.{key}}}}}"


def _when(condition: str, handed: dict[str, Any], scope: str, labels: dict[str, str]) -> str:
    found = _CONDITION.fullmatch(condition)
    if not found:
        raise ValueError(f"a condition that has no form for Argo: {condition}")
    return f"'{_value(handed[found[1]], handed, scope, labels)}' {found[2]} '{found[3]}'"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-").lower()


def _short(name: str) -> str:
    return name.removeprefix(_CHANNEL)


def _slug(label: str) -> str:
    """A name that Argo takes: "train (hybrid, round 1)" is train-hybrid-round-1."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def manifest(documents: list[dict[str, Any]]) -> str:
    """Documents as YAML, every part written out where it is."""
    return yaml.dump_all(documents, Dumper=_WithoutAliases, sort_keys=False, width=120)


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
