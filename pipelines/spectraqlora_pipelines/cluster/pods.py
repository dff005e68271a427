"""What Kubernetes knows of a run and Kubeflow Pipelines does not tell: its workflow, its pods, their ends and logs."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from spectraqlora.errors import InputError

from spectraqlora_pipelines.cluster.values import METHOD, STEP

_RUN, _CONTAINER = "pipeline/runid", "main"
_TIMEOUT_S = 15
_STARTING = frozenset({"PodInitializing", "ContainerCreating"})
_MEANINGS = (
    (r"OOMKilled", "it needed more memory than memory.limit lets it have"),
    (r"ImagePull|InvalidImageName|ErrImageNeverPull", "its image cannot be fetched: image.registry, image.tag, pull_secrets"),
    (r"exceeded quota", "the namespace's quota has no room for it"),
    (r"Unschedulable|nodes are available", "no node has room for it, or fits its node_selector and tolerations"),
    (r"active on the node longer|DeadlineExceeded", "it took longer than its time_limit"),
    (r"Max duration limit exceeded", "retries.max_backoff was over since its first attempt began"),
    (r"Evicted|low on resource", "its node ran out of memory or disk"),
    (r"CreateContainerConfigError", "a Secret or ConfigMap that the values file names is missing, or has no such key"),
    (
        r"pod deleted|Terminated|NodeShutdown|Preempt",
        "its pod was deleted, as a drain or an autoscaler does; KFP does not try it again, submit --resubmit does",
    ),
)  # fmt: skip


class NoAccess(InputError):
    """Kubernetes cannot be asked from here."""


class Pods:
    """The pods of a namespace, as the user of this machine's kubeconfig, or a pod's service account, may see them.

    Args:
        namespace: where the runs' pods are.

    Raises:
        NoAccess: neither names a cluster.
    """

    def __init__(self, namespace: str) -> None:
        from kubernetes import client, config

        self.namespace = namespace
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        files = os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
        try:
            if any(os.path.isfile(file) for file in files.split(os.pathsep)):
                config.load_kube_config(files)
            else:
                config.load_incluster_config()
        except Exception as error:  # A broken file shows in errors of many kinds.
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise NoAccess("kubeconfig", "", f"a KUBECONFIG of the cluster ({first})") from None
        self._core, self._objects = client.CoreV1Api(), client.CustomObjectsApi()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            reason = (
                f"permission in namespace {self.namespace}; Kubernetes answered {error.status} {error.reason}"
            )
            raise NoAccess("kubeconfig", self.namespace, reason) from None
        except (HTTPError, OSError) as error:
            raise NoAccess("kubeconfig", self.namespace, f"a cluster that answers ({error})") from None

    def workflow(self, run_id: str) -> dict[str, Any] | None:
        """The Argo workflow of a run; None where it is deleted already."""
        with self._asking():
            found = self._objects.list_namespaced_custom_object(
                "argoproj.io",
                "v1alpha1",
                self.namespace,
                "workflows",
                label_selector=f"{_RUN}={run_id}",
                _request_timeout=_TIMEOUT_S,
            )
        if not found["items"]:
            return None
        workflow: dict[str, Any] = found["items"][0]
        status = workflow.get("status", {})
        if packed := status.get("compressedNodes"):  # Argo does so where they are more than a MiB.
            status["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
        return workflow

    def of(self, run_id: str, step: str = "", method: str = "") -> list[Any]:
        """The pods of a run's steps that are still there, oldest first."""
        labels = {_RUN: run_id, STEP: step, METHOD: method}
        selector = ",".join(
            f"{key}={value}" if value else key for key, value in labels.items() if value or key == STEP
        )
        with self._asking():
            pods = self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=_TIMEOUT_S
            ).items
        return sorted(pods, key=lambda pod: str(pod.metadata.creation_timestamp))

    def log(self, name: str, lines: int | None = None) -> str:
        """What a pod's step has printed, or its last lines; empty before it has begun."""
        from kubernetes.client import ApiException

        with self._asking():
            try:
                # As bytes: the client would take a log that is JSON for more than its text.
                answer = self._core.read_namespaced_pod_log(
                    name,
                    self.namespace,
                    container=_CONTAINER,
                    tail_lines=lines,
                    _preload_content=False,
                    _request_timeout=_TIMEOUT_S,
                )
            except ApiException as error:
                if error.status == 400:  # The container has not begun.
                    return ""
                raise
        return str(answer.data.decode("utf-8", "replace"))


def labelled(pod: Any) -> tuple[str, str]:
    """A pod's step and method."""
    labels = pod.metadata.labels or {}
    return labels.get(STEP, ""), labels.get(METHOD, "")


def said_of(pod: Any) -> str:
    """Why a pod waits or failed, in Kubernetes' words; empty where nothing is wrong."""
    status = pod.status
    if status.reason:
        return f"{status.reason}: {status.message or ''}"
    for container in [*(status.init_container_statuses or []), *(status.container_statuses or [])]:
        waiting, ended = container.state.waiting, container.state.terminated
        if waiting and waiting.reason not in _STARTING:
            return f"{waiting.reason}: {waiting.message or ''}"
        if ended and ended.exit_code:
            return f"{ended.reason} (exit code {ended.exit_code})"
    for condition in status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message or ''}"
    return ""


def explained(said: str) -> str:
    """What Kubernetes' or Argo's words mean here, and the words; empty where they say no more than that it failed."""
    first = " ".join(said.split())
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, first):
            return f"{meaning} ({first[:200]})"
    return ""
