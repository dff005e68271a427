"""A run as it is now: the tree of its steps, and why those that failed or wait do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from spectraqlora_pipelines.cluster.client import Kubeflow
from spectraqlora_pipelines.cluster.kube import NoAccess
from spectraqlora_pipelines.cluster.pods import Pods, explained, labelled, said_of
from spectraqlora_pipelines.cluster.progress import (
    ENDED,
    Step,
    nodes_of_tasks,
    nodes_of_workflow,
    own_error,
    steps_of,
)

_DELETED = "; KFP does not try it again, submit --resubmit does"
_LINES = 300
"""Lines from the end of a failed step's log in which its error is looked for."""
_SLACK = timedelta(seconds=2)
"""A pod may be there before it is written down when its step began."""


@dataclass(frozen=True)
class View:
    """A run as it was when it was looked at.

    Args:
        run: KFP's record of it, or Argo's: id, name and state.
        tree: its steps.
        reasons: of those that failed or wait, by label; as far as Kubernetes tells.
        unseen: why Kubernetes could not be asked; empty where it was.
    """

    run: Any
    tree: Step
    reasons: dict[str, str]
    unseen: str

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return self.run.state in ENDED

    def failed(self) -> Iterator[Step]:
        """The steps that failed."""
        return (step for step in self.tree.leaves() if step.state == "failed")


class Viewer:
    """Looks at runs, through Kubernetes as well where that can be asked.

    Args:
        server: Kubeflow Pipelines.
        namespace: of the runs' pods.
    """

    def __init__(self, server: Kubeflow, namespace: str) -> None:
        self._server, self._pipelines = server, dict[str, dict[str, Any]]()
        self._pods: Pods | None = None
        self._unseen = ""
        try:
            self._pods = Pods(namespace)
        except NoAccess as error:
            self._unseen = str(error)

    def look(self, wanted: str) -> View:
        """A run by its id, or the newest of a name.

        Raises:
            InputError: there is none, or the server does not answer.
        """
        run = self._server.run(wanted)
        if run.run_id not in self._pipelines:
            self._pipelines[run.run_id] = self._server.pipeline_of(run)
        pipeline, pods, unseen = self._pipelines[run.run_id], list[Any](), self._unseen
        workflow = None
        if self._pods is not None:
            try:
                workflow, pods = self._pods.workflow(run.run_id), self._pods.of(run.run_id)
            except NoAccess as error:
                unseen = str(error)
        if workflow is not None:
            name, nodes = workflow["metadata"]["name"], nodes_of_workflow(workflow)
        else:
            tasks = (run.run_details.task_details if run.run_details else None) or []
            name, nodes = nodes_of_tasks(pipeline, tasks)
        tree = steps_of(pipeline, nodes, name, run.state in ENDED)
        return View(run, tree, reasons_of(tree, pods, self._pods, _DELETED), unseen)


def reasons_of(tree: Step, pods: list[Any], source: Pods | None, deleted: str) -> dict[str, str]:
    """Why steps failed or wait, by label, as far as Kubernetes tells.

    Args:
        tree: the run's steps.
        pods: those of them that are still there.
        source: gives their logs; None gives none.
        deleted: what becomes of a step whose pod was deleted.
    """
    attempts: dict[tuple[str, str], list[Any]] = {}
    for pod in pods:
        attempts.setdefault(labelled(pod), []).append(pod)
    reasons = {}
    for step in tree.leaves():
        if step.state in ("failed", "running"):
            own = [pod for pod in attempts.get((step.step, step.method), []) if _is_of(pod, step)]
            reason = _reason(step, own, source, deleted)
            if reason:
                reasons[step.label] = reason
    return reasons


def _is_of(pod: Any, step: Step) -> bool:
    """Whether a pod of a step and method is of this round's step: the rounds before had theirs."""
    return step.started is None or pod.metadata.creation_timestamp >= step.started - _SLACK


def _reason(step: Step, attempts: list[Any], source: Pods | None, deleted: str) -> str:
    """Why a step failed or waits; of one that is tried again, why the attempt before failed."""
    said = said_of(attempts[-1]) if attempts else ""
    known = explained(said, deleted) or explained(step.message, deleted)
    ended = bool(attempts) and attempts[-1].status.phase == "Failed"
    if known or (said and not ended and step.state == "running"):
        return known or said
    failed = [pod for pod in attempts if pod.status.phase == "Failed"]
    log = ""
    if failed and source is not None:
        with contextlib.suppress(NoAccess):
            log = source.log(failed[-1].metadata.name, _LINES)
    if own := own_error(log):
        return own if ended else f"the attempt before: {own}"
    # Of a container beside the step's own, Argo's words say more than the pod's exit code.
    return max(said, step.message, key=len)
