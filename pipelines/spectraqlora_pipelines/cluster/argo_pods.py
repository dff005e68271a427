"""A step's pod as Argo Workflows is told of it, from the values file.

Argo prepares a step's input artifacts as folders and takes its outputs from others; the root file system is read-only.
"""

from __future__ import annotations

import json
import math
from typing import Any

from spectraqlora.runtime import run_key
from spectraqlora.runtime.component import plain
from spectraqlora.runtime.images import IMAGE_USER, component_of, image_reference, step_names

from spectraqlora_pipelines.cluster.environment import step_environment
from spectraqlora_pipelines.cluster.fields import seconds
from spectraqlora_pipelines.cluster.values import (
    CONTAINER,
    METHOD,
    SCRATCH,
    STEP,
    ClusterValues,
    StepValues,
    image_name,
)

INPUTS, OUTPUTS = "/inputs", "/outputs"
"""Folders of a step's artifacts in its container, each below by its name."""
RUN_UID = "{{workflow.uid}}"
BACKOFF_CAP = "10m"
"""The longest wait between two attempts."""
FINAL = "lastRetry.exitCode != '2' && !(lastRetry.message contains 'OOMKilled')"
"""When a step is tried again: not where it refused its input, and not where it needs more memory than it may use."""
COMMAND = ["python3", "-m", "spectraqlora"]
_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
}


def pod_of(step: str, method: str, arguments: list[str], values: ClusterValues) -> dict[str, Any]:
    """The parts of a step's template that say how its pod runs.

    Args:
        step: its name.
        method: of the branch that it is in; empty outside of branches.
        arguments: of its command line.
        values: of the cluster.
    """
    placed = values.step(step)
    user = placed.user.run_as_user or IMAGE_USER
    labels = {**placed.labels, STEP: step, **({METHOD: method} if method else {})}
    volumes, mounts = _volumes(placed)
    return _without_nothing(
        {
            "metadata": _without_nothing({"labels": labels, "annotations": dict(placed.annotations)}),
            "nodeSelector": dict(placed.node_selector),
            "affinity": _affinity(placed),
            "tolerations": [_toleration(toleration) for toleration in placed.tolerations],
            "securityContext": {
                "runAsUser": user,
                "runAsGroup": placed.user.run_as_group or 0,
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
                **({"fsGroup": values.argo.fs_group} if values.argo.fs_group is not None else {}),
            },
            "activeDeadlineSeconds": seconds(placed.time_limit) if placed.time_limit else None,
            "retryStrategy": _retries(placed),
            "volumes": volumes,
            "container": _container(step, arguments, placed, mounts),
            "podSpecPatch": _patch(user, seconds(values.argo.grace)),
        }
    )


def run_of(values: ClusterValues) -> dict[str, Any]:
    """The parts of a workflow's spec that belong to the run and not to a step."""
    run, argo = values.run, values.argo
    steps = [values.defaults, *(values.step(name) for name in sorted(values.steps))]
    pull = sorted({name for step in steps for name in step.pull_secrets})
    repository = {"configMap": argo.repository.config_map, "key": argo.repository.key}
    return _without_nothing(
        {
            "serviceAccountName": run.service_account,
            "imagePullSecrets": [{"name": name} for name in pull],
            "activeDeadlineSeconds": seconds(run.time_limit) if run.time_limit else None,
            "ttlStrategy": {"secondsAfterCompletion": seconds(run.keep_finished)}
            if run.keep_finished
            else None,
            "parallelism": argo.parallelism,
            "artifactRepositoryRef": _without_nothing(repository) if argo.repository.config_map else None,
            # The pods of a run that failed stay, for their logs.
            "podGC": {"strategy": "OnWorkflowSuccess", "deleteDelayDuration": "1h"},
            # A store that does not answer must not keep a workflow from being deleted.
            "artifactGC": _without_nothing(
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
    own = image_reference(plain(component_of(step)).__dict__["image"])
    image = placed.image.reference(image_name(own))
    requests = _without_nothing({"cpu": placed.cpu.request, "memory": placed.memory.request})
    limits = _without_nothing({"cpu": placed.cpu.limit, "memory": placed.memory.limit})
    if placed.gpu.count:
        limits[placed.gpu.resource] = str(placed.gpu.count)
    return _without_nothing(
        {
            "name": CONTAINER,
            "image": image,
            "imagePullPolicy": placed.image.pull_policy,
            "command": COMMAND,
            "args": [step, *arguments],
            "env": _variables(placed, image),
            "resources": _without_nothing({"requests": requests, "limits": limits}),
            "securityContext": _RESTRICTED,
            "volumeMounts": mounts,
        }
    )


def _variables(placed: StepValues, image: str) -> list[dict[str, Any]]:
    plainly = {run_key.VARIABLE: RUN_UID, **step_environment(placed, image)}
    entries: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plainly.items()]
    kinds = (("secretKeyRef", placed.secrets), ("configMapKeyRef", placed.config_maps))
    for kind, sources in kinds:
        for source in sources:
            for name, key in source.env.items():
                reference = {"name": source.name, "key": key, "optional": source.optional}
                entries.append({"name": name, "valueFrom": {kind: reference}})
    return entries


def _volumes(placed: StepValues) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step's volumes, and where its container mounts them."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"name": "outputs", "emptyDir": {}}, {"mountPath": OUTPUTS})
    ]
    if placed.scratch.size:
        claim = _without_nothing(
            {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": placed.scratch.storage_class,
                "resources": {"requests": {"storage": placed.scratch.size}},
            }
        )
        volume = {"name": SCRATCH, "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
        found.append((volume, {"mountPath": placed.scratch.path}))
    if placed.shm:
        memory = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": placed.shm}}
        found.append((memory, {"mountPath": "/dev/shm"}))
    if placed.cache.claim:
        cache = {"name": "cache", "persistentVolumeClaim": {"claimName": placed.cache.claim}}
        where = {"mountPath": placed.cache.path, "subPath": placed.cache.sub_path}
        found.append((cache, _without_nothing(where)))
    for number, secret in enumerate(placed.secrets):
        if secret.mount:
            given = {"secret": {"secretName": secret.name, "optional": secret.optional}}
            found.append(
                ({"name": f"secret-{number}", **given}, {"mountPath": secret.mount, "readOnly": True})
            )
    for number, config in enumerate(placed.config_maps):
        if config.mount:
            given = {"configMap": {"name": config.name, "optional": config.optional}}
            found.append(
                ({"name": f"config-{number}", **given}, {"mountPath": config.mount, "readOnly": True})
            )
    if "/tmp" not in (mount["mountPath"] for _, mount in found):
        found.append(({"name": "tmp", "emptyDir": {}}, {"mountPath": "/tmp"}))
    mounts = [{"name": volume["name"], **mount} for volume, mount in found]
    return [volume for volume, _ in found], mounts


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


def _affinity(placed: StepValues) -> dict[str, Any] | None:
    asked: list[dict[str, Any]] = []
    preferred: list[dict[str, Any]] = []
    for term in placed.affinity:
        rules = [
            _without_nothing({"key": rule.key, "operator": rule.operator, "values": list(rule.values)})
            for rule in term.rules
        ]
        if term.weight is None:
            asked.append({"matchExpressions": rules})
        else:
            preferred.append({"weight": term.weight, "preference": {"matchExpressions": rules}})
    required = {"nodeSelectorTerms": asked} if asked else None
    terms = {
        "requiredDuringSchedulingIgnoredDuringExecution": required,
        "preferredDuringSchedulingIgnoredDuringExecution": preferred,
    }
    found = _without_nothing(terms)
    return {"nodeAffinity": found} if found else None


def _toleration(toleration: Any) -> dict[str, Any]:
    given = toleration.model_dump(exclude_none=True)
    if "seconds" in given:
        given["tolerationSeconds"] = given.pop("seconds")
    return given


def _whole(factor: float) -> int:
    return math.ceil(factor)


def _without_nothing(given: dict[str, Any]) -> dict[str, Any]:
    """The entries that say something."""
    return {key: value for key, value in given.items() if value not in (None, "", [], {})}
