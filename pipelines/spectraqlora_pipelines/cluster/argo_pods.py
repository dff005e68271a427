"""A step's pod as Argo Workflows is told of it, from the values file.

Argo prepares a step's input artifacts as folders and takes its outputs from others; the root file system is read-only.
"""

from __future__ import annotations

import json
import math
from typing import Any

from spectraqlora.runtime import run_key
from spectraqlora.runtime.images import IMAGE_USER, step_names
from spectraqlora.steps.train.train_job import POD, TEMPLATE

from spectraqlora_pipelines.cluster.environment import step_environment
from spectraqlora_pipelines.cluster.fields import seconds
from spectraqlora_pipelines.cluster.pod_parts import (
    RESTRICTED,
    affinity,
    image_of,
    resources,
    security_context,
    toleration,
    variables,
    volumes_and_mounts,
    without_nothing,
)
from spectraqlora_pipelines.cluster.pods import TOO_MUCH_WRITTEN
from spectraqlora_pipelines.cluster.train_job import POD_NAME, placed_step, train_job, trains_on_nodes
from spectraqlora_pipelines.cluster.values import (
    CONTAINER,
    METHOD,
    STEP,
    ClusterValues,
    StepValues,
)

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where Kubernetes puts a service account's token in every container that has nothing there: Argo's own needs it."""
INPUTS, OUTPUTS = "/inputs", "/outputs"
"""Folders of a step's artifacts in its container, each below by its name."""
RUN_UID = "{{workflow.uid}}"
BACKOFF_CAP = "10m"
"""The longest wait between two attempts."""
FINAL = f"lastRetry.exitCode != '2' && !(lastRetry.message matches 'OOMKilled|{TOO_MUCH_WRITTEN}')"
"""When a step is tried again: not where it refused its input, nor where it needs more memory or storage than it may use."""
COMMAND = ["python3", "-m", "spectraqlora"]
STOP = """
import contextlib, os, signal, time

def parent(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[1]

steps = [pid for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == "1"]
for pid in steps:
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGTERM)
while any(os.path.exists(f"/proc/{pid}") for pid in steps):
    time.sleep(0.1)
"""
"""What runs in a step's container before its pod is deleted: tells the step, and waits until it has ended.

Argo's executor is the container's first process; of SIGTERM, Argo 4.0's kills the step at once.
"""


def pod_of(
    step: str, method: str, arguments: list[str], values: ClusterValues, nodes: int = 1
) -> dict[str, Any]:
    """The parts of a step's template that say how its pod runs.

    Args:
        step: its name.
        method: of the branch that it is in; empty outside of branches.
        arguments: of its command line.
        values: of the cluster.
        nodes: machines that train together.
    """
    placed = placed_step(values, step, nodes)
    user = placed.user.run_as_user or IMAGE_USER
    labels = {**placed.labels, STEP: step, **({METHOD: method} if method else {})}
    volumes, mounts = volumes_and_mounts(placed)
    volumes.append({"name": "outputs", "emptyDir": {}})
    mounts.append({"name": "outputs", "mountPath": OUTPUTS})
    asks_kubernetes = trains_on_nodes(step, nodes)
    if not asks_kubernetes:
        volumes.append({"name": "no-token", "emptyDir": {}})
        mounts.append({"name": "no-token", "mountPath": ACCOUNT, "readOnly": True})
    container = _container(step, arguments, placed, mounts)
    if asks_kubernetes:
        own_name = {"valueFrom": {"fieldRef": {"fieldPath": POD_NAME}}}
        container["env"] += [{"name": TEMPLATE, "value": train_job(values)}, {"name": POD, **own_name}]
    return without_nothing(
        {
            "metadata": without_nothing({"labels": labels, "annotations": dict(placed.annotations)}),
            "nodeSelector": dict(placed.node_selector),
            "affinity": affinity(placed),
            "tolerations": [toleration(given) for given in placed.tolerations],
            "securityContext": security_context(placed, values.argo.fs_group),
            "activeDeadlineSeconds": seconds(placed.time_limit) if placed.time_limit else None,
            "retryStrategy": _retries(placed),
            "volumes": volumes,
            "container": container,
            "podSpecPatch": _patch(user, seconds(values.argo.grace)),
        }
    )


def run_of(values: ClusterValues) -> dict[str, Any]:
    """The parts of a workflow's spec that belong to the run and not to a step."""
    run, argo = values.run, values.argo
    steps = [values.defaults, *(values.step(name) for name in sorted(values.steps))]
    pull = sorted({name for step in steps for name in step.pull_secrets})
    repository = {"configMap": argo.repository.config_map, "key": argo.repository.key}
    return without_nothing(
        {
            "serviceAccountName": run.service_account,
            "imagePullSecrets": [{"name": name} for name in pull],
            "activeDeadlineSeconds": seconds(run.time_limit) if run.time_limit else None,
            "ttlStrategy": {"secondsAfterCompletion": seconds(run.keep_finished)}
            if run.keep_finished
            else None,
            "parallelism": argo.parallelism,
            "artifactRepositoryRef": without_nothing(repository) if argo.repository.config_map else None,
            # The pods of a run that failed stay, for their logs.
            "podGC": {"strategy": "OnWorkflowSuccess", "deleteDelayDuration": "1h"},
            # A store that does not answer must not keep a workflow from being deleted.
            "artifactGC": without_nothing(
                {
                    "strategy": "OnWorkflowDeletion",
                    "forceFinalizerRemoval": True,
                    # Else the pod that deletes them has the namespace's default account.
                    "serviceAccountName": run.service_account,
                }
            ),
        }
    )


def not_argos(values: ClusterValues) -> list[str]:
    """A line for each value that the file gives and Argo has no use for."""
    given = values.run.model_fields_set
    instead = {
        "pipeline_root": "argo.repository names where Argo keeps artifacts",
        "experiment": "tracking.experiment names MLflow's",
        "ui": "a run is found by its workflow's name",
    }
    lines = [
        f"run.{key}: {getattr(values.run, key)!r}: not used by Argo Workflows; {words}"
        for key, words in instead.items()
        if key in given
    ]
    for name in step_names():
        factor = values.step(name).retries.factor
        if factor != _whole(factor):
            lines.append(
                f"steps.{name}.retries.factor: {factor:g}: Argo Workflows takes whole numbers; it is {_whole(factor)}"
            )
    return lines


def _patch(user: int, grace: int) -> str:
    """What a template has no place for: the time to end, and Argo's own containers, which run as the step's user.

    They write input artifacts for their user alone, and an installation may have given them another one.
    """
    same = {"securityContext": {"runAsUser": user}}
    patch = {
        "terminationGracePeriodSeconds": grace,
        "initContainers": [{"name": "init", **same}],
        "containers": [{"name": "wait", **same}],
    }
    return json.dumps(patch)


def _container(
    step: str, arguments: list[str], placed: StepValues, mounts: list[dict[str, Any]]
) -> dict[str, Any]:
    image = image_of(step, placed)
    return without_nothing(
        {
            "name": CONTAINER,
            "image": image,
            "imagePullPolicy": placed.image.pull_policy,
            "command": COMMAND,
            "args": [step, *arguments],
            "env": variables({run_key.VARIABLE: RUN_UID, **step_environment(placed, image)}, placed),
            "resources": resources(placed),
            "lifecycle": {"preStop": {"exec": {"command": ["python3", "-c", STOP]}}},
            "securityContext": RESTRICTED,
            "volumeMounts": mounts,
        }
    )


def _retries(placed: StepValues) -> dict[str, Any] | None:
    retries = placed.retries
    if not retries.attempts:
        return None
    wait = {
        "duration": str(seconds(retries.backoff)),
        "factor": str(_whole(retries.factor)),
        "cap": BACKOFF_CAP,
    }
    if retries.max_backoff:
        wait["maxDuration"] = str(seconds(retries.max_backoff))
    # Always: of a pod that was deleted as well, by a drain or an autoscaler.
    return {"limit": str(retries.attempts), "retryPolicy": "Always", "expression": FINAL, "backoff": wait}


def _whole(factor: float) -> int:
    return math.ceil(factor)
