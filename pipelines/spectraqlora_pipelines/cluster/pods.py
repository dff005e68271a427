"""What Kubernetes knows of a run and Kubeflow Pipelines does not tell: its workflow, its pods, their ends and logs."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any

from spectraqlora_pipelines.cluster.kube import TIMEOUT_S, asking, connect
from spectraqlora_pipelines.cluster.values import CONTAINER, METHOD, STEP

RUN_OF_KFP, RUN_OF_ARGO = "pipeline/runid", "workflows.argoproj.io/workflow"
"""Labels that say which run a pod belongs to: KFP's id of it, and the name of its workflow."""
_STARTING = frozenset({"PodInitializing", "ContainerCreating"})
TOO_MUCH_WRITTEN = "total limit of containers|local ephemeral storage limit|EmptyDir volume"
"""Kubernetes' words, as a regular expression, for a pod that wrote more than its limits let it."""
_DELETED = "its pod was deleted, as a drain or an autoscaler does"
_MEANINGS = (
    (r"OOMKilled", "it needed more memory than memory.limit lets it have"),
    (r"ImagePull|InvalidImageName|ErrImageNeverPull", "its image cannot be fetched: image.registry, image.tag, pull_secrets"),
    (r"exceeded quota", "the namespace's quota has no room for it"),
    (r"Unschedulable|nodes are available", "no node has room for it, or fits its node_selector and tolerations"),
    (r"active on the node longer|DeadlineExceeded", "it took longer than its time_limit"),
    (r"Max duration limit exceeded", "retries.max_backoff was over since its first attempt began"),
    (TOO_MUCH_WRITTEN, "it wrote more than its ephemeral-storage limit, or a volume's size, lets it: limitRange, scratch, shm"),
    (r"Evicted|low on resource|The node had condition", "its node ran out of memory or disk"),
    (r"CreateContainerConfigError", "a Secret or ConfigMap that the values file names is missing, or has no such key"),
    (r"pod deleted|Terminated|NodeShutdown|Preempt|exit code 143", _DELETED),
)  # fmt: skip


class Pods:
    """The pods of a namespace, as the user of this machine's kubeconfig, or a pod's service account, may see them.

    Args:
        namespace: where the runs' pods are.
        run_label: the pods' label that says which run they belong to.

    Raises:
        NoAccess: neither names a cluster.
    """

    def __init__(self, namespace: str, run_label: str = RUN_OF_KFP) -> None:
        from kubernetes import client

        connect()
        self.namespace, self._run_label = namespace, run_label
        self._core, self._objects = client.CoreV1Api(), client.CustomObjectsApi()

    def workflow(self, run_id: str) -> dict[str, Any] | None:
        """The Argo workflow of a run; None where it is deleted already."""
        with asking(self.namespace):
            found = self._objects.list_namespaced_custom_object(
                "argoproj.io",
                "v1alpha1",
                self.namespace,
                "workflows",
                label_selector=f"{self._run_label}={run_id}",
                _request_timeout=TIMEOUT_S,
            )
            items: list[dict[str, Any]] = found["items"]
        return unpacked(items[0]) if items else None

    def of(self, run_id: str, step: str = "", method: str = "") -> list[Any]:
        """The pods of a run's steps that are still there, oldest first."""
        labels = {self._run_label: run_id, STEP: step, METHOD: method}
        selector = ",".join(
            f"{key}={value}" if value else key for key, value in labels.items() if value or key == STEP
        )
        with asking(self.namespace):
            pods = self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=TIMEOUT_S
            ).items
        return sorted(pods, key=lambda pod: str(pod.metadata.creation_timestamp))

    def log(self, name: str, lines: int | None = None) -> str:
        """What a pod's step has printed, or its last lines; empty before it has begun and after it has gone."""
        from kubernetes.client import ApiException

        with asking(self.namespace):
            try:
                # As bytes: the client would take a log that is JSON for more than its text.
                answer = self._core.read_namespaced_pod_log(
                    name,
                    self.namespace,
                    container=CONTAINER,
                    tail_lines=lines,
                    _preload_content=False,
                    _request_timeout=TIMEOUT_S,
                )
            except ApiException as error:
                if error.status in (400, 404):  # The container has not begun, or the pod has just gone.
                    return ""
                raise
        return str(answer.data.decode("utf-8", "replace"))


def unpacked(workflow: dict[str, Any]) -> dict[str, Any]:
    """A workflow with its nodes, which Argo compresses where they are more than a MiB."""
    status = workflow.get("status", {})
    if packed := status.get("compressedNodes"):
        status["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
    return workflow


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


def explained(said: str, deleted: str = "") -> str:
    """What Kubernetes' or Argo's words mean here, and the words; empty where they say no more than that it failed.

    Args:
        said: the words.
        deleted: what becomes of a step whose pod was deleted.
    """
    first = " ".join(said.split())
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, first):
            return f"{meaning}{deleted if meaning == _DELETED else ''} ({first[:200]})"
    return ""
