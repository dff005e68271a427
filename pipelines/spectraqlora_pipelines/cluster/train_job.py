"""A training on several machines as the values file places it: the TrainJob's pods get what `steps.train` says.

The step's own pod only waits for them: it gets no GPU and goes to any node that takes a step without values of its own.
"""

from __future__ import annotations

import json
from typing import Any

from spectraqlora.steps.train.train_job import API, CONTAINER

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
from spectraqlora_pipelines.cluster.values import STEP, ClusterValues, StepValues

TRAIN = "train"
COMMAND = ["python3", "-m", "spectraqlora.steps.train.node"]
POD_NAME = "metadata.name"
"""Where Kubernetes has the name of a pod."""
QUEUE = "kueue.x-k8s.io/queue-name"
NO_SIDECAR = {"sidecar.istio.io/inject": "false"}
"""A service mesh's proxy would stand between the machines, and keep the job from ending."""
_WAITING: dict[str, Any] = {
    "cpu": {"request": "250m"},
    "memory": {"request": "1Gi", "limit": "4Gi"},
    "gpu": {},
    "shm": None,
    "time_limit": None,
}
"""What the pod that waits needs: it moves folders, of which it never holds one in memory."""


def trains_on_nodes(step: str, nodes: int) -> bool:
    """Whether a step has a TrainJob do its work."""
    return step == TRAIN and nodes > 1


def waiting_step(values: ClusterValues) -> StepValues:
    """The train step's own pod: images, variables and volumes as it has them, placed as any step, for as long as a queue."""
    common = values.defaults
    anywhere = {
        "node_selector": common.node_selector, "affinity": common.affinity, "tolerations": common.tolerations,
    }  # fmt: skip
    train = values.step(TRAIN).model_dump(exclude_unset=True)
    return StepValues.model_validate({**train, **_WAITING, **anywhere})


def train_job(values: ClusterValues) -> str:
    """The TrainJob as JSON, but for what the step adds: its name, its owner, how many machines, and its arguments."""
    placed = values.step(TRAIN)
    image = image_of(TRAIN, placed)
    labels = {**placed.labels, **NO_SIDECAR, STEP: TRAIN}
    volumes, mounts = volumes_and_mounts(placed)
    pod = without_nothing(
        {
            "serviceAccountName": values.run.service_account,
            "imagePullSecrets": [{"name": name} for name in placed.pull_secrets],
            "nodeSelector": dict(placed.node_selector),
            "affinity": affinity(placed),
            "tolerations": [toleration(given) for given in placed.tolerations],
            "securityContext": security_context(placed, values.argo.fs_group),
            "terminationGracePeriodSeconds": seconds(values.argo.grace),
            "volumes": volumes,
            "containers": [{"name": CONTAINER, "securityContext": RESTRICTED, "volumeMounts": mounts}],
        }
    )
    metadata = {"labels": labels, "annotations": {**placed.annotations, **NO_SIDECAR}}
    jobs = [{"name": CONTAINER, "template": {"spec": {"template": {"metadata": metadata, "spec": pod}}}}]
    runtime = {"apiGroup": API[0], "kind": "TrainingRuntime", "name": values.nodes.runtime}
    job = {
        "apiVersion": "/".join(API),
        "kind": "TrainJob",
        "metadata": {
            "labels": without_nothing({STEP: TRAIN, QUEUE: values.nodes.queue}),
            "annotations": NO_SIDECAR,
        },
        "spec": without_nothing(
            {
                "runtimeRef": runtime,
                "activeDeadlineSeconds": seconds(placed.time_limit) if placed.time_limit else None,
                "trainer": without_nothing(
                    {
                        "image": image,
                        "command": COMMAND,
                        "env": variables(step_environment(placed, image), placed),
                        "resourcesPerNode": resources(placed),
                    }
                ),
                "runtimePatches": [
                    {
                        "manager": "spectraqlora.io/train",
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
                    }
                ],
            }
        ),
    }
    # Argo would take two braces for a reference of its own.
    return json.dumps(job, sort_keys=True).replace("{{", "{\\u007b")


def placed_step(values: ClusterValues, step: str, nodes: int) -> StepValues:
    """A step's values; those of the pod that waits where others train."""
    return waiting_step(values) if trains_on_nodes(step, nodes) else values.step(step)
