"""How far a run on Kubeflow Pipelines is: its compiled pipeline as a tree, every step with its state and times.

Argo runs a pipeline as a workflow of nodes. A node is named by its path in the DAG: `WORKFLOW.root.branch-hybrid.train`
is a step, `….train-driver` what KFP does before it, `….train.executor` its pod and, where it is tried again,
`….train.executor(0)` its first attempt; an exit task is `….exit-handler-1.onExit`. Kubernetes has the workflow with
all of this (`nodes_of_workflow`) until it is deleted; KFP keeps names, states and times only, and of a node's
children the ids, which are hashes of their names (`nodes_of_tasks`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

State = Literal["waiting", "running", "done", "cached", "failed", "skipped", "stopped"]
ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
"""States in which KFP leaves a run."""
_PHASES: dict[str, State] = {
    "pending": "running",
    "running": "running",
    "succeeded": "done",
    "skipped": "skipped",
    "omitted": "skipped",
    "failed": "failed",
    "error": "failed",
    "canceling": "running",
    "canceled": "stopped",
}


@dataclass(frozen=True)
class Node:
    """A node of the workflow.

    Args:
        name: its path.
        phase: in Argo's or KFP's words.
        message: why it is in this phase, where that is known.
        started: when it began.
        finished: when it ended; None while it runs.
    """

    name: str
    phase: str
    message: str = ""
    started: datetime | None = None
    finished: datetime | None = None

    @property
    def state(self) -> State:
        """The phase in this module's words."""
        return _PHASES.get(self.phase.lower(), "waiting")


@dataclass(frozen=True)
class Step:
    """A step, or a group of steps, of a run.

    Args:
        label: its name for people, such as `train (hybrid, round 1)`.
        step: name of the step; empty for a group.
        method: of the branch that it is in; empty outside of branches.
        state: how far it is.
        started: when it began.
        finished: when it ended; None while it runs.
        attempts: how often it began, where that is known.
        message: what the workflow says of its state.
        parts: of a group.
    """

    label: str
    step: str
    method: str
    state: State
    started: datetime | None = None
    finished: datetime | None = None
    attempts: int = 0
    message: str = ""
    parts: tuple[Step, ...] = field(default=())

    def leaves(self) -> Iterator[Step]:
        """All steps in it."""
        if self.step:
            yield self
        for part in self.parts:
            yield from part.leaves()


def steps_of(pipeline: dict[str, Any], nodes: dict[str, Node], workflow: str, ended: bool = False) -> Step:
    """The tree of a run.

    Args:
        pipeline: the compiled pipeline.
        nodes: of its workflow, by name.
        workflow: its name.
        ended: whether the run has ended, so that what has not begun never will.
    """
    tree = _Tree(pipeline, nodes)
    root = tree.group(pipeline["pipelineInfo"]["name"], pipeline["root"]["dag"], f"{workflow}.root", "")
    return ended_steps(root) if ended else root


def ended_steps(step: Step) -> Step:
    """A run's steps when it has ended: what has not begun never will."""
    state = {"waiting": "skipped", "running": "stopped"}.get(step.state, step.state)
    return replace(step, state=state, parts=tuple(ended_steps(part) for part in step.parts))  # type: ignore[arg-type]


class _Tree:
    def __init__(self, pipeline: dict[str, Any], nodes: dict[str, Node]) -> None:
        self._components, self._nodes = pipeline["components"], nodes
        self._executors = pipeline["deploymentSpec"]["executors"]

    def group(self, label: str, dag: dict[str, Any], path: str, method: str) -> Step:
        """A DAG whose tasks' nodes are below `path`."""
        parts = []
        for name in in_order(dag["tasks"]):
            task = dag["tasks"][name]
            component = self._components[task["componentRef"]["name"]]
            shown = task["taskInfo"].get("name", name)
            below = f"{path}.{name}"
            if is_exit_task(task):
                below = next((known for known in self._nodes if known.endswith(f".onExit.{name}")), below)
            if "dag" in component:
                given = task.get("inputs", {}).get("parameters", {}).get("method", {})
                inner = given.get("runtimeValue", {}).get("constant", "") or method
                parts.append(self.group(shown, component["dag"], below, inner))
            else:
                parts.append(self._step(shown, component, below, method))
        node = self._nodes.get(path)
        state = node.state if node else state_of(parts)
        times = (node.started, node.finished) if node else (None, None)
        return Step(
            label, "", method, state, *times, message=node.message if node else "", parts=tuple(parts)
        )

    def _step(self, label: str, component: dict[str, Any], path: str, method: str) -> Step:
        arguments = self._executors[component["executorLabel"]]["container"]["args"]
        step = arguments[arguments.index("--function_to_execute") + 1].replace("_", "-")
        node, executor = self._nodes.get(path), self._nodes.get(f"{path}.executor")
        driver = self._nodes.get(f"{path}-driver")
        tries = attempts_of(self._nodes, f"{path}.executor")
        if node is None:
            # Its driver runs before it, and where that fails it never begins.
            before: State = driver.state if driver and driver.state in ("running", "failed") else "waiting"
            return Step(
                label,
                step,
                method,
                before,
                driver.started if driver else None,
                None,
                0,
                last_message([driver]),
            )
        state: State = node.state
        if state == "done" and executor is not None and executor.state == "skipped":
            state = "cached"
        attempts = len(tries) or int(executor is not None and state != "cached")
        message = last_message([*tries, executor, node])
        return Step(label, step, method, state, node.started, node.finished, attempts, message)


def attempts_of(nodes: dict[str, Node], path: str) -> list[Node]:
    """A step's attempts, the first one first: a workflow keeps its nodes in no order.

    Args:
        nodes: of the workflow.
        path: of the node that tries; its attempts have a number behind it.
    """
    tries = [known for name, known in nodes.items() if path and name.startswith(f"{path}(")]
    return sorted(tries, key=lambda known: int(known.name.removeprefix(f"{path}(").partition(")")[0]))


def last_message(nodes: list[Node | None]) -> str:
    """The last thing that is said of a step that is not done."""
    said = [node.message for node in nodes if node and node.message and node.state != "done"]
    # Argo says of what holds a failed node only that some child failed.
    telling = [text for text in said if "child" not in text and "No more retries" not in text]
    return (telling or said or [""])[-1]


def state_of(parts: list[Step]) -> State:
    """State of a group that has no node of its own yet, from its parts'."""
    states = {part.state for part in parts}
    order: tuple[State, ...] = ("failed", "running")
    for state in order:
        if state in states:
            return state
    return "done" if parts and states <= {"done", "cached", "skipped"} else "waiting"


def is_exit_task(task: dict[str, Any]) -> bool:
    """Whether a compiled task runs after others however they ended."""
    return bool(task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED")


def in_order(tasks: dict[str, Any]) -> list[str]:
    """A DAG's tasks, each after those that it depends on, else as they are compiled."""
    placed: list[str] = []

    def place(name: str) -> None:
        if name not in placed:
            for before in tasks[name].get("dependentTasks", []):
                place(before)
            placed.append(name)

    for name in sorted(tasks, key=lambda name: is_exit_task(tasks[name])):
        place(name)
    return placed


def nodes_of_workflow(workflow: dict[str, Any]) -> dict[str, Node]:
    """The nodes of an Argo workflow as Kubernetes has it."""
    return {
        node["name"]: Node(
            node["name"],
            node.get("phase") or "",
            node.get("message") or "",
            _time(node.get("startedAt")),
            _time(node.get("finishedAt")),
        )
        for node in (workflow.get("status", {}).get("nodes") or {}).values()
    }


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def nodes_of_tasks(pipeline: dict[str, Any], tasks: list[Any]) -> tuple[str, dict[str, Node]]:
    """The workflow's name and its nodes, as far as KFP's own record of a run says.

    A record has no path, only the last part of it, and the ids of the nodes that follow. Where several nodes are
    called alike, those tell which it is: a step's own pod, a driver's step. A node that nothing follows, and that
    shares its name, stays unknown.
    """
    roots = [task for task in tasks if _hashed_children(task)]
    heads = {child.rpartition("-")[0] for task in roots for child in _hashed_children(task)}
    workflow = next((t.display_name for t in tasks if t.display_name in heads), next(iter(heads), ""))
    names = [f"{workflow}.root-driver", *_names(pipeline, pipeline["root"]["dag"], f"{workflow}.root")]
    by_id = {f"{workflow}-{_fnv32a(name)}": name for name in names}
    called: dict[str, list[str]] = {}
    for name in names:
        called.setdefault(name.rpartition(".")[2], []).append(name)
    nodes: dict[str, Node] = {}
    for task in tasks:
        candidates = called.get(task.display_name, [])
        children = {by_id[child] for child in _hashed_children(task) if child in by_id}
        fitting = [name for name in candidates if any(_follows(child, name) for child in children)]
        if len(fitting or candidates) == 1:
            (name,) = fitting or candidates
            nodes[name] = Node(name, task.state or "", "", _begun(task.start_time), _begun(task.end_time))
    followed = {by_id[child] for task in tasks for child in _hashed_children(task) if child in by_id}
    for name in followed:
        # What is tried again has a node for every attempt; with none, it was taken from the cache.
        if name.endswith(".executor") and f"{name}(1)" in names and f"{name}(0)" not in followed:
            nodes.setdefault(name, Node(name, "SKIPPED"))
    return workflow, nodes


def _hashed_children(task: Any) -> list[str]:
    return [child.pod_name for child in task.child_tasks or [] if child.pod_name]


def _begun(moment: datetime | None) -> datetime | None:
    """KFP writes the year 1970 for what has not happened."""
    return moment if moment and moment > datetime(1971, 1, 1, tzinfo=UTC) else None


def _follows(child: str, name: str) -> bool:
    return child.startswith((f"{name}.", f"{name}(")) or (
        name.endswith("-driver") and child == name[: -len("-driver")]
    )


def _names(pipeline: dict[str, Any], dag: dict[str, Any], path: str) -> Iterator[str]:
    """Names of all nodes that a DAG may have."""
    yield path
    for name, task in dag["tasks"].items():
        component = pipeline["components"][task["componentRef"]["name"]]
        below = f"{path}.{name}"
        if is_exit_task(task):
            (ended,) = task["dependentTasks"]
            below = f"{path}.{ended}.onExit.{name}"
            yield f"{path}.{ended}.onExit"
        yield f"{below}-driver"
        if "dag" in component:
            yield from _names(pipeline, component["dag"], below)
            continue
        yield from (below, f"{below}.executor")
        retries = int(task.get("retryPolicy", {}).get("maxRetryCount", 0))
        yield from (f"{below}.executor({number})" for number in range(retries + 1))


def _fnv32a(text: str) -> int:
    """FNV-1a of 32 bits, by which Argo makes a node's id of its name."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def duration(step: Step, now: datetime) -> str:
    """How long a step took, or has taken until now: `42s`, `3m10s`, `2h05m`; empty where it has not begun."""
    if step.started is None:
        return ""
    took = max(0, round(((step.finished or now) - step.started).total_seconds()))
    hours, minutes, rest = took // 3600, took // 60 % 60, took % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def own_error(log: str) -> str:
    """What a step said of its own end: the line that begins with `error:`, else a traceback's last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("error: ")]
    if own:
        return own[-1]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return raised[-1] if raised else ""
