"""A run on Argo Workflows as it is now: its templates as a tree, every step with its state and times.

A node is named by its path: `WORKFLOW.all-steps.branch-hybrid.train-hybrid-round-1` is a step, the same with `(0)` its
first attempt. The workflow keeps the templates that it began with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectraqlora_pipelines.cluster.argo_client import RUN, Argo
from spectraqlora_pipelines.cluster.kube import NoAccess
from spectraqlora_pipelines.cluster.pods import RUN_OF_ARGO, Pods
from spectraqlora_pipelines.cluster.progress import (
    ENDED,
    Node,
    Step,
    attempts_of,
    ended_steps,
    last_message,
    nodes_of_workflow,
    state_of,
)
from spectraqlora_pipelines.cluster.values import METHOD, STEP
from spectraqlora_pipelines.cluster.view import View, reasons_of

_STATES = {"Succeeded": "SUCCEEDED", "Failed": "FAILED", "Error": "FAILED", "": "PENDING"}
_DELETED = "; it is tried again"


@dataclass(frozen=True)
class ArgoRun:
    """A workflow in the words that KFP has for a run."""

    run_id: str
    display_name: str
    state: str


def run_of(workflow: dict[str, Any]) -> ArgoRun:
    """A workflow as a run."""
    metadata, phase = workflow["metadata"], workflow.get("status", {}).get("phase", "")
    name = (metadata.get("labels") or {}).get(RUN, metadata["name"])
    return ArgoRun(metadata["name"], name, _STATES.get(phase, phase.upper()))


class ArgoViewer:
    """Looks at runs of Argo Workflows."""

    def __init__(self, argo: Argo) -> None:
        self._argo, self._pods = argo, Pods(argo.namespace, RUN_OF_ARGO)

    def look(self, wanted: str) -> View:
        """A run by its workflow's name, or the newest of a name.

        Raises:
            InputError: there is none, or Kubernetes does not answer.
        """
        workflow = self._argo.workflow(wanted)
        run, tree = run_of(workflow), argo_steps_of(workflow)
        pods, unseen = list[Any](), ""
        try:
            pods = self._pods.of(run.run_id)
        except NoAccess as error:
            unseen = str(error)
        return View(run, tree, reasons_of(tree, pods, self._pods, _DELETED), unseen)


def argo_steps_of(workflow: dict[str, Any]) -> Step:
    """The tree of a workflow."""
    name, status = workflow["metadata"]["name"], workflow.get("status", {})
    spec = status.get("storedWorkflowTemplateSpec") or workflow["spec"]
    templates = {template["name"]: template for template in spec.get("templates", [])}
    nodes = nodes_of_workflow(workflow)
    if not templates or (not nodes and status.get("message")):
        # Argo has not looked at it yet, or cannot begin it.
        state = "failed" if status.get("message") else "waiting"
        return Step(name, "", "", state, message=status.get("message", ""))  # type: ignore[arg-type]
    tree = _Tree(templates, nodes)
    root = tree.group(spec["entrypoint"], templates[spec["entrypoint"]], name)
    # The root, and what surrounds all steps for the exit task's sake, say nothing of their own.
    parts = root.parts[0].parts if len(root.parts) == 1 and root.parts[0].parts else root.parts
    for hook in spec.get("hooks", {}).values():
        path = next((known for known in (f"{name}.onExit", f"{name}.hooks.exit") if known in nodes), "")
        parts = (*parts, tree.step(hook["template"], templates[hook["template"]], path))
    whole = Step(
        root.label, "", "", root.state, root.started, root.finished, message=root.message, parts=parts
    )
    return ended_steps(whole) if run_of(workflow).state in ENDED else whole


class _Tree:
    def __init__(self, templates: dict[str, dict[str, Any]], nodes: dict[str, Node]) -> None:
        self._templates, self._nodes = templates, nodes

    def group(self, label: str, template: dict[str, Any], path: str) -> Step:
        """A DAG whose tasks' nodes are below `path`."""
        parts = []
        for task in template["dag"]["tasks"]:
            called, below = self._templates[task["template"]], f"{path}.{task['name']}"
            make = self.group if "dag" in called else self.step
            parts.append(make(task["name"], called, below))
        node = self._nodes.get(path)
        times = (node.started, node.finished) if node else (None, None)
        state = node.state if node else state_of(parts)
        method = next((part.method for part in parts if part.method), "")
        return Step(
            label, "", method, state, *times, message=node.message if node else "", parts=tuple(parts)
        )

    def step(self, label: str, template: dict[str, Any], path: str) -> Step:
        """A step whose attempts' nodes are `path(0)` and so on, or its own where it is tried once."""
        labels = template["metadata"]["labels"]
        node = self._nodes.get(path)
        tries = attempts_of(self._nodes, path)
        if node is None:
            return Step(label, labels[STEP], labels.get(METHOD, ""), "waiting")
        message = last_message([*tries, node])
        attempts = max(1, len(tries))
        return Step(
            label,
            labels[STEP],
            labels.get(METHOD, ""),
            node.state,
            node.started,
            node.finished,
            attempts,
            message,
        )
