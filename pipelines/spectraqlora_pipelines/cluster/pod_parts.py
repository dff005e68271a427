"""Parts of a pod as Kubernetes has them, from a step's values: what Argo's templates and TrainJobs have in common."""

from __future__ import annotations

from typing import Any

from spectraqlora.runtime.images import IMAGE_USER, image_reference, own_image

from spectraqlora_pipelines.cluster.values import SCRATCH, StepValues, TolerationValues, image_name

RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
}
"""What every container of ours is held to."""


def image_of(step: str, placed: StepValues) -> str:
    """Full reference of the image that a step runs in."""
    return placed.image.reference(image_name(image_reference(own_image(step))))


def security_context(placed: StepValues, fs_group: int | None) -> dict[str, Any]:
    """Of a pod: its user, who is never root, and the group that its volumes are given to."""
    return {
        "runAsUser": placed.user.run_as_user or IMAGE_USER,
        "runAsGroup": placed.user.run_as_group or 0,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        **({"fsGroup": fs_group} if fs_group is not None else {}),
    }


def resources(placed: StepValues) -> dict[str, Any]:
    """Requests and limits of a container, GPUs among the limits."""
    requests = without_nothing({"cpu": placed.cpu.request, "memory": placed.memory.request})
    limits = without_nothing({"cpu": placed.cpu.limit, "memory": placed.memory.limit})
    if placed.gpu.count:
        limits[placed.gpu.resource] = str(placed.gpu.count)
    return without_nothing({"requests": requests, "limits": limits})


def variables(plainly: dict[str, str], placed: StepValues) -> list[dict[str, Any]]:
    """A container's environment: plain variables, and those of the step's Secrets and ConfigMaps."""
    entries: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plainly.items()]
    kinds = (("secretKeyRef", placed.secrets), ("configMapKeyRef", placed.config_maps))
    for kind, sources in kinds:
        for source in sources:
            for name, key in source.env.items():
                reference = {"name": source.name, "key": key, "optional": source.optional}
                entries.append({"name": name, "valueFrom": {kind: reference}})
    return entries


def volumes_and_mounts(placed: StepValues) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A step's volumes, and where its container mounts them."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if placed.scratch.size:
        claim = without_nothing(
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
        found.append((cache, without_nothing(where)))
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


def affinity(placed: StepValues) -> dict[str, Any] | None:
    """Which nodes a pod asks for or prefers."""
    asked: list[dict[str, Any]] = []
    preferred: list[dict[str, Any]] = []
    for term in placed.affinity:
        rules = [
            without_nothing({"key": rule.key, "operator": rule.operator, "values": list(rule.values)})
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
    found = without_nothing(terms)
    return {"nodeAffinity": found} if found else None


def toleration(given: TolerationValues) -> dict[str, Any]:
    """A taint that a pod tolerates."""
    fields = given.model_dump(exclude_none=True)
    if "seconds" in fields:
        fields["tolerationSeconds"] = fields.pop("seconds")
    return fields


def without_nothing(given: dict[str, Any]) -> dict[str, Any]:
    """The entries that say something."""
    return {key: value for key, value in given.items() if value not in (None, "", [], {})}
