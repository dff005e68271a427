"""A TrainJob of Kubeflow Trainer, through Kubernetes' API: created or found again, followed, waited for, deleted.

Not by Kubeflow's own SDK (PyPI `kubeflow`): it makes a job's requests its limits, brings its function as a file, and is
a dozen packages more; what is needed here are five calls of Kubernetes' client.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spectraqlora.errors import InputError, NoAnswer, Stopped, busy
from spectraqlora.runtime.console import ERROR, say, warn

TEMPLATE = "SPECTRAQLORA_TRAIN_JOB"
"""Environment variable with the TrainJob as JSON, but for its name, owner and arguments; written where it is compiled."""
POD = "SPECTRAQLORA_POD"
"""Environment variable with the name of the pod that this is."""
API = ("trainer.kubeflow.org", "v1alpha1")
CONTAINER = "node"
"""Trainer's name for the container that trains, and for the replicated job of its pods."""
_STARTING = ("ContainerCreating", "PodInitializing")
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_POLL_SECONDS, _SIGNAL_SECONDS, _TIMEOUT_SECONDS = 2.0, 0.1, 15
_LOG_SECONDS = 10.0
"""How long the first pod's last lines are waited for once the job has ended."""


class TrainJob:
    """One TrainJob of this pod's namespace.

    Args:
        name: of the job; the same training of the same run has the same.

    Raises:
        InputError: this is no pod with a service account.
    """

    def __init__(self, name: str) -> None:
        from kubernetes import client, config

        try:
            config.load_incluster_config()
            self.namespace = (_ACCOUNT / "namespace").read_text(encoding="utf-8")
        except (config.ConfigException, OSError) as error:
            raise InputError("train.nodes", name, f"a pod with a service account ({error})") from None
        self.name = name
        self._objects, self._core = client.CustomObjectsApi(), client.CoreV1Api()
        self._followed: dict[str, threading.Thread] = {}
        self._said = ""

    def run(self, document: dict[str, Any], prepare: Callable[[], None], stopped: Callable[[], int]) -> None:
        """Create the job, or take up the one that an earlier attempt of this step created, and wait for its end.

        Args:
            document: the job, but for its name and owner.
            prepare: called before a job is created.
            stopped: the number of the signal that came, 0 for none.

        Raises:
            InputError: a refusal of Kubernetes.
            JobFailed: the job failed.
            Stopped: a signal came; the job is deleted, and its pods keep what they have done.
        """
        job = self._settled(stopped)
        if job is None:
            prepare()
            self._create(document)
            say(f"created TrainJob {self.name}")
        else:
            say(f"TrainJob {self.name} is there from an earlier attempt; waiting for it")
        while True:
            job = self._patiently(self._find)
            if job is None:
                raise JobFailed(f"TrainJob {self.name} was deleted by somebody else")
            self._patiently(self._follow)
            self._report(job)
            kind, message = _end(job)
            if kind:
                self._last_lines()
                if kind == "Failed":
                    raise self._why(message)
                return
            self._pause(stopped)

    def _settled(self, stopped: Callable[[], int]) -> dict[str, Any] | None:
        """The job that can be waited for; None where one is to be created. One that failed or is going goes first."""
        while True:
            with self._asking():
                job = self._find()
                if job is None:
                    return None
                going = "deletionTimestamp" in job["metadata"]
                if not going and _end(job)[0] != "Failed":
                    return job
                if not going:
                    self._delete()
            if number := stopped():
                raise Stopped(number, "stopped before it trained")
            time.sleep(_POLL_SECONDS)

    def _pause(self, stopped: Callable[[], int]) -> None:
        """Wait until it is time to ask again; a signal is acted on at once, as whoever sends it may not wait long."""
        until = time.monotonic() + _POLL_SECONDS
        while time.monotonic() < until:
            if number := stopped():
                with self._asking():
                    self._delete()
                done = f"stopped; TrainJob {self.name} is deleted, and a retry resumes from its checkpoints"
                raise Stopped(number, done)
            time.sleep(_SIGNAL_SECONDS)

    def _find(self) -> dict[str, Any] | None:
        from kubernetes.client import ApiException

        try:
            found = self._objects.get_namespaced_custom_object(
                *API, self.namespace, "trainjobs", self.name, _request_timeout=_TIMEOUT_SECONDS
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        if not isinstance(found, dict) or "metadata" not in found:
            raise ValueError("no object of Kubernetes")
        return found

    def _create(self, document: dict[str, Any]) -> None:
        with self._asking():
            metadata = {**document.get("metadata", {}), "name": self.name, "ownerReferences": [self._owner()]}
            self._objects.create_namespaced_custom_object(
                *API,
                self.namespace,
                "trainjobs",
                {**document, "metadata": metadata},
                _request_timeout=_TIMEOUT_SECONDS,
            )

    def _delete(self) -> None:
        from kubernetes.client import ApiException

        try:
            self._objects.delete_namespaced_custom_object(
                *API, self.namespace, "trainjobs", self.name, _request_timeout=_TIMEOUT_SECONDS
            )
        except ApiException as error:
            if error.status != 404:
                raise

    def _owner(self) -> dict[str, Any]:
        """What the job goes with: the workflow that this pod is of, whose retries find it again, else the pod."""
        pod = self._core.read_namespaced_pod(
            os.environ.get(POD, ""), self.namespace, _request_timeout=_TIMEOUT_SECONDS
        )
        for owner in pod.metadata.owner_references or []:
            if owner.controller:
                return {
                    "apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid,
                }  # fmt: skip
        return {"apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid}

    def _pods(self, selector: str = "") -> list[Any]:
        of_job = f"jobset.sigs.k8s.io/jobset-name={self.name}"
        found = self._core.list_namespaced_pod(
            self.namespace,
            label_selector=f"{of_job},{selector}" if selector else of_job,
            _request_timeout=_TIMEOUT_SECONDS,
        )
        return list(found.items)

    def _follow(self) -> None:
        """Print the log of the first machine's pod, that of every attempt."""
        for pod in self._pods("batch.kubernetes.io/job-completion-index=0"):
            begun = [s for s in pod.status.container_statuses or [] if s.state.running or s.state.terminated]
            if begun and pod.metadata.uid not in self._followed:
                follow = threading.Thread(target=self._print_log, args=(pod.metadata.name,), daemon=True)
                self._followed[pod.metadata.uid] = follow
                follow.start()

    def _print_log(self, pod: str) -> None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            log = self._core.read_namespaced_pod_log(
                pod, self.namespace, container=CONTAINER, follow=True, _preload_content=False
            )
            for line in log:
                say(line.decode(errors="replace").rstrip("\n"))
        except (ApiException, HTTPError, OSError) as error:
            warn(f"the log of pod {pod} is not shown any further ({type(error).__name__}); training goes on")

    def _last_lines(self) -> None:
        self._patiently(self._follow)
        until = time.monotonic() + _LOG_SECONDS
        for follow in self._followed.values():
            follow.join(max(0.0, until - time.monotonic()))

    def _why(self, message: str) -> JobFailed:
        """What the machine said, or how it ended, that ended first; Trainer knows that one did, and no more."""
        ends = [
            (status.state.terminated.finished_at, pod, status.state.terminated)
            for pod in self._patiently(self._pods)
            for status in pod.status.container_statuses or []
            if status.name == CONTAINER and status.state.terminated and status.state.terminated.exit_code
        ]
        if not ends:
            return JobFailed(f"TrainJob {self.name} failed: {message}")
        _, pod, end = min(ends, key=lambda each: each[0])
        machine = pod.metadata.labels["batch.kubernetes.io/job-completion-index"]
        if end.exit_code not in (InputError.exit_code, NoAnswer.exit_code):
            how = f"{end.reason}, exit code {end.exit_code}"
            return JobFailed(f"TrainJob {self.name} failed: machine {machine} ended ({how}); {message}")
        log = self._patiently(
            lambda: self._core.read_namespaced_pod_log(
                pod.metadata.name, self.namespace, container=CONTAINER, tail_lines=50
            )
        )
        lines = [line.removeprefix(ERROR).strip() for line in log.splitlines() if line.startswith(ERROR)]
        return JobFailed(
            (lines or [f"machine {machine} refused its input; pod {pod.metadata.name}"])[-1], end.exit_code
        )

    def _report(self, job: dict[str, Any]) -> None:
        """Say how many machines are at work, where that has changed."""
        status = job.get("status", {})
        suspended = any(
            c["type"] == "Suspended" and c["status"] == "True" for c in status.get("conditions", [])
        )
        nodes = job["spec"]["trainer"]["numNodes"]
        pods = self._patiently(self._pods)
        begun = sum(pod.status.phase in ("Running", "Succeeded") for pod in pods)
        line = "waits in its queue" if suspended else f"has {begun} of {nodes} machines"
        obstacles = [found for pod in pods if (found := obstacle(pod))]
        line += f": {obstacles[0]}" if obstacles else ""
        if line != self._said and not _end(job)[0]:
            say(f"TrainJob {self.name} {line}")
            self._said = line

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """What Kubernetes answers, however long it is away: the job trains on without it."""

        warned = False
        while True:
            try:
                with self._asking():
                    return ask()
            except _Away as error:
                if not warned:
                    warn(f"{error}; TrainJob {self.name} is asked for again")
                warned = True
                time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Refusals as one line.

        Raises:
            InputError: what Kubernetes refuses; `_Away` where it cannot be asked now.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            answered = f"Kubernetes answered {error.status} {error.reason}{_message(error)}"
            if busy(error.status):
                raise _Away("train.nodes", self.name, f"a Kubernetes API that answers; {answered}") from None
            needs = "Kubeflow Trainer, its runtime, and a service account that may use trainjobs"
            raise InputError(
                "train.nodes", self.name, f"{needs} in namespace {self.namespace}; {answered}"
            ) from None
        except (HTTPError, OSError, ValueError) as error:  # The last where the answer's body was lost.
            raise _Away(
                "train.nodes", self.name, f"a Kubernetes API that answers ({type(error).__name__})"
            ) from None


def obstacle(pod: Any) -> str:
    """What keeps a pod from starting, as Kubernetes says it; empty where nothing does."""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return str(condition.message or condition.reason)
    for status in pod.status.container_statuses or []:
        waiting = status.state.waiting if status.state else None
        if waiting and waiting.message and waiting.reason not in _STARTING:
            return f"{waiting.reason}: {waiting.message}"
    return ""


class JobFailed(Exception):
    """A TrainJob that failed.

    Args:
        line: why; where a machine said so, its own line.
        exit_code: of that machine, 1 where it said nothing.
    """

    def __init__(self, line: str, exit_code: int = 1) -> None:
        super().__init__(line)
        self.exit_code = exit_code


class _Away(NoAnswer):
    """Kubernetes does not answer now."""


def _end(job: dict[str, Any]) -> tuple[str, str]:
    """(Complete or Failed, why); empty texts while the job goes on."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return condition["type"], condition.get("message", "") or condition.get("reason", "")
    return "", ""


def _message(error: Any) -> str:
    """What Kubernetes says of a refusal; empty where it says nothing."""
    try:
        return f": {json.loads(error.body)['message']}"
    except (TypeError, ValueError, LookupError):
        return ""
