"""A run's Argo workflow for tests, in the form of Argo's own nodes, and KFP's record of the same nodes.

Names, ids and links of nodes are as Argo makes them of the workflow that KFP compiles: `Workflow` walks a compiled
pipeline as KFP's compiler does, and ids are hashed as in recorded workflows (`test_progress.py` has some).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

BEGIN = datetime(2026, 11, 26, 12, 0, 0, tzinfo=UTC)


def node_id(workflow: str, name: str) -> str:
    """The id of a node: the workflow's name alone for its root, else that and FNV-1a of the node's name."""
    if name == workflow:
        return workflow
    value = 2166136261
    for byte in name.encode():
        value = ((value ^ byte) * 16777619) % 2**32
    return f"{workflow}-{value}"


@dataclass
class Workflow:
    """The nodes of a run of a compiled pipeline.

    Args:
        pipeline: compiled.
        run_id: of KFP's run.
        name: of the workflow.
    """

    pipeline: dict[str, Any]
    run_id: str
    name: str = "spectraqlora-ablation-x7k2p"
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add(self.name, "Running", "DAG")
        self.add(f"{self.name}.root-driver", "Succeeded", "Pod", after=self.name)
        self.add(f"{self.name}.root", "Running", "DAG", after=f"{self.name}.root-driver")

    def add(self, name: str, phase: str, kind: str, after: str = "", message: str = "") -> None:
        """A node, which follows another one: that has it among its children."""
        if name not in self.nodes:
            started = BEGIN + timedelta(seconds=10 * len(self.nodes))
            last = name.rpartition(".")[2] if name != self.name else name
            self.nodes[name] = {
                "id": node_id(self.name, name), "name": name, "displayName": last, "type": kind,
                "startedAt": started.isoformat().replace("+00:00", "Z"), "children": [],
            }  # fmt: skip
            if after:
                self.nodes[after]["children"].append(node_id(self.name, name))
        node = self.nodes[name]
        node["phase"] = phase
        if message:
            node["message"] = message
        ended = phase in ("Succeeded", "Failed", "Error", "Skipped")
        begun = datetime.fromisoformat(node["startedAt"])
        node["finishedAt"] = (
            (begun + timedelta(seconds=95)).isoformat().replace("+00:00", "Z") if ended else None
        )

    def group(self, path: str, phase: str) -> str:
        """A nested pipeline, such as `branch-hybrid`, with its driver; returns its node's name."""
        parent, _, last = f"{self.name}.root.{path}".rpartition(".")
        driver, name = f"{parent}.{last}-driver", f"{parent}.{last}"
        self.add(driver, "Succeeded", "Pod", after=self._end_of(parent))
        self.add(name, phase, "DAG", after=driver)
        return name

    def step(self, path: str, phase: str, *tries: tuple[str, str], cached: bool = False) -> None:
        """A step, below groups, with the phase and message of each attempt."""
        parent, _, last = f"{self.name}.root.{path}".rpartition(".")
        driver, name = f"{parent}.{last}-driver", f"{parent}.{last}"
        self.add(driver, "Succeeded", "Pod", after=self._end_of(parent))
        self.add(
            name, phase, "DAG", after=driver, message="" if phase != "Failed" else f"child '{last}' failed"
        )
        executor = f"{name}.executor"
        if cached:
            self.add(
                executor, "Skipped", "Skipped", after=name, message="when 'true != true' evaluated false"
            )
            return
        message = "No more retries left" if phase == "Failed" else ""
        self.add(executor, phase, "Retry", after=name, message=message)
        for number, (state, said) in enumerate(tries or [(phase, "")]):
            self.add(f"{executor}({number})", state, "Pod", after=executor, message=said)

    def _end_of(self, parent: str) -> str:
        """The node after which the next one in a DAG begins; the DAG itself where it is the first."""
        inside = [
            name for name in self.nodes if name.startswith(f"{parent}.") and not self.nodes[name]["children"]
        ]
        return inside[-1] if inside else parent

    def end(self, phase: str) -> None:
        """The workflow has ended, and with it the nodes that hold the others."""
        for name in (f"{self.name}.root", self.name):
            self.add(name, phase, "DAG")

    def object(self) -> dict[str, Any]:
        """As Kubernetes has it."""
        return {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Workflow",
            "metadata": {
                "name": self.name,
                "namespace": "kubeflow",
                "labels": {"pipeline/runid": self.run_id},
            },
            "status": {
                "phase": self.nodes[self.name]["phase"],
                "nodes": {node["id"]: node for node in self.nodes.values()},
            },
        }

    def task_details(self) -> list[dict[str, Any]]:
        """As KFP's API tells of it: names, states and times, children by their ids, no messages and no own id."""
        states = {"Error": "FAILED", "Omitted": "SKIPPED"}
        details = []
        for node in self.nodes.values():
            details.append(
                {
                    "run_id": self.run_id,
                    "task_id": str(uuid.uuid4()),
                    "display_name": node["displayName"],
                    "create_time": BEGIN.isoformat(),
                    "start_time": node["startedAt"],
                    "end_time": node["finishedAt"] or "1970-01-01T00:00:00Z",
                    "state": states.get(node["phase"], node["phase"].upper()),
                    "child_tasks": [{"pod_name": child} for child in node["children"]],
                }
            )
        return details
