"""The values file of `compile --target kubernetes` and `--target argo`: where and how every step runs on a cluster.

`defaults` holds for all steps, `steps.NAME` for one of them; a step's value wins, mappings are merged key by
key and lists are replaced. `digests` pins images, `run` holds what belongs to a run and not to a step, `argo` what only
Argo Workflows has, and `nodes` what a training on several machines needs. Secrets are named, never held, and of those in
`defaults` a step is given what it needs (`cluster.credentials`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import spectraqlora
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from spectraqlora.documents import read_yaml
from spectraqlora.errors import InputError, holds_secret
from spectraqlora.runtime.images import images, own_image, step_names
from spectraqlora.signing import SIGNING_KEY

from spectraqlora_pipelines.cluster.credentials import may_see
from spectraqlora_pipelines.cluster.fields import (
    Cpu,
    Digest,
    Duration,
    EnvName,
    GpuResource,
    KeyFormat,
    LabelKey,
    LabelValue,
    Memory,
    MountPath,
    Name,
    PipelineRoot,
    Registry,
    Tag,
    WebAddress,
    exceeds,
    seconds,
)

NEVER_CACHED = frozenset({"close-runs", "detect-changes", "start-point", "register", "promote"})
"""Steps that read or change what is kept elsewhere: an old result would miss what happened there since."""

SCRATCH = "scratch"
"""Name of a step's own volume."""
LACKING = {
    "ephemeral_storage": "scratch.size, which reserves a volume for the step's files",
    "fs_group": "nothing here",
    "pod_affinity": "affinity, which is about nodes",
    "priority_class": "nothing here",
    "runtime_class": "nothing here",
}
"""What a pod may have and KFP has no place for, and what there is instead."""
_WITHOUT_KFP = "KFP has no place for it; pipelines/README.md, What KFP has no place for, names a way"
CONTAINER = "main"
"""Argo's name for a step's container."""
STEP, METHOD = "spectraqlora/step", "spectraqlora/method"
"""Labels of a step's pods; the second of those in a method's branch."""
_TIME_LIMIT, _TRAIN_TIME_LIMIT, _RUN_TIME_LIMIT = "12h", "7d", "30d"
"""Without them a step with a wrong image name, and a run whose pods fit on no node, would wait for ever."""
_UNLIMITED_S = 10 * 365 * 86400
_BUILT_IN: dict[str, dict[str, Any]] = {"train": {"shm": "1Gi", "time_limit": _TRAIN_TIME_LIMIT}}
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE", re.IGNORECASE)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageValues(_Part):
    registry: Registry = Field(
        "", description="Registry and path before the image's own name; empty leaves the name alone"
    )
    tag: Tag = Field(spectraqlora.__version__, description="Tag of the image")
    digest: Digest = Field("", description="sha256:… pins the image's content; the tag is then not used")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="When the node pulls the image"
    )

    def reference(self, name: str) -> str:
        """Full reference of the step image `name`, such as spectraqlora/train."""
        full = f"{self.registry}/{name}" if self.registry else name
        return f"{full}@{self.digest}" if self.digest else f"{full}:{self.tag}"


def _request_within_limit(part: Any) -> Any:
    if part.request and part.limit and exceeds(part.request, part.limit):
        raise ValueError(f"a request of at most the limit {part.limit}; the request is {part.request}")
    return part


class CpuValues(_Part):
    request: Cpu | None = Field(
        None,
        description="CPU cores that the node must have free; a step computes with as many threads, without a "
        "request with as many as the limit",
    )
    limit: Cpu | None = Field(None, description="CPU cores that the step may use at most")

    _ordered = model_validator(mode="after")(_request_within_limit)


class MemoryValues(_Part):
    request: Memory | None = Field(None, description="Memory that the node must have free")
    limit: Memory | None = Field(None, description="Memory above which the step is ended")

    _ordered = model_validator(mode="after")(_request_within_limit)


class GpuValues(_Part):
    count: int = Field(
        0, ge=0, le=64, description="GPUs; Kubernetes takes the same number as request and limit"
    )
    resource: GpuResource = Field("nvidia.com/gpu", description="The node resource that counts them")


class TolerationValues(_Part):
    key: str | None = Field(None, description="Taint's key; none with operator Exists tolerates all")
    operator: Literal["Equal", "Exists"] = Field("Equal", description="How the taint is compared")
    value: str | None = Field(None, description="Taint's value, for operator Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Taint's effect; none is every effect"
    )
    seconds: int | None = Field(None, ge=0, description="How long NoExecute is tolerated")

    @model_validator(mode="after")
    def _operator_fits(self) -> TolerationValues:
        if self.operator == "Equal" and not self.key:
            raise ValueError("a key, or operator Exists")
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("no value with operator Exists")
        return self


class RetryValues(_Part):
    attempts: int = Field(2, ge=0, le=20, description="How often a failed step is tried again")
    backoff: Duration = Field("30s", description="Wait before the first of these")
    factor: float = Field(2.0, ge=1, le=10, description="The wait grows by this factor each time")
    max_backoff: Duration | None = Field(
        None,
        description="No wait, but a window, as KFP hands it to Argo: so long after the first attempt began, no other "
        "one begins, and one that runs is ended; none is time_limit for every attempt, and the waits between",
    )


class _Source(_Part):
    """What a Secret or a ConfigMap gives: variables, files, or both."""

    name: str
    env: dict[EnvName, str]
    mount: MountPath | None

    @model_validator(mode="after")
    def _gives_something(self) -> _Source:
        if not self.env and not self.mount:
            raise ValueError("env, mount or both")
        if self.mount and (len(self.name) > 63 or "." in self.name):
            # KFP calls the pod's volume after it, and a volume's name has neither.
            raise _At(("name",), self.name, "a name of at most 63 characters without dots, to be mounted")
        return self


class SecretValues(_Source):
    name: Name = Field(description="Existing Secret in the namespace of the runs")
    env: dict[EnvName, str] = Field({}, description="Environment variable: key inside the Secret; names only")
    mount: MountPath | None = Field(
        None, description="Folder in which each key of the Secret is a file, such as /etc/s3"
    )
    optional: bool = Field(False, description="Whether steps start without the Secret")
    all_steps: bool = Field(
        False,
        description="Under defaults: give it to every step, not to those alone that need whose credentials it holds; "
        "where KFP's launcher or MLflow's client reads a bucket with the step's own credentials",
    )

    def for_step(self, step: str) -> SecretValues | None:
        """What a step is given of it: without the variables that it has no need of; None where nothing is left."""
        if self.all_steps or not self.env:
            return self
        env = {name: key for name, key in self.env.items() if may_see(step, name)}
        return self.model_copy(update={"env": env}) if env else None


class ConfigMapValues(_Source):
    name: Name = Field(description="Existing ConfigMap in the namespace of the runs")
    env: dict[EnvName, str] = Field({}, description="Environment variable: key inside the ConfigMap")
    mount: MountPath | None = Field(
        None, description="Folder in which each key of the ConfigMap is a file, such as /etc/company-ca"
    )
    optional: bool = Field(False, description="Whether steps start without the ConfigMap")


class AffinityRule(_Part):
    key: LabelKey = Field(description="Node label")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(
        "In", description="How the label's value is compared"
    )
    values: tuple[LabelValue, ...] = Field((), description="What it is compared with")

    @model_validator(mode="after")
    def _has_what_it_compares_with(self) -> AffinityRule:
        counts = {"In": range(1, 1000), "NotIn": range(1, 1000), "Gt": range(1, 2), "Lt": range(1, 2)}
        if len(self.values) not in counts.get(self.operator, range(1)):
            raise _At(
                ("values",), list(self.values), f"as many values as operator {self.operator} compares with"
            )
        return self


class AffinityValues(_Part):
    rules: tuple[AffinityRule, ...] = Field(min_length=1, description="All of these hold for the node")
    weight: int | None = Field(
        None, ge=1, le=100, description="Prefer such nodes by this weight; none asks for one of them"
    )


class ScratchValues(_Part):
    size: Memory | None = Field(
        None, description="Size of a volume for the step's own files; none is no volume"
    )
    path: MountPath = Field("/tmp", description="Where it is mounted")
    storage_class: Name | None = Field(None, description="Its storage class; none is the cluster's default")


class CacheValues(_Part):
    claim: Name | None = Field(
        None,
        description="Existing claim (ReadWriteMany) that all steps share for copies from the hub (HF_HOME) and from "
        "S3 (XDG_CACHE_HOME); their user or group must be able to write it",
    )
    path: MountPath = Field("/cache", description="Where it is mounted, the same path in every step")
    sub_path: str = Field("", description="Folder inside the volume")


class UserValues(_Part):
    run_as_user: int | None = Field(
        None, ge=1, description="User id of the step; none is the image's own, which is not root"
    )
    run_as_group: int | None = Field(None, ge=0, description="Group id of the step")


class StepValues(_Part):
    """What one step gets."""

    image: ImageValues = ImageValues()
    cpu: CpuValues = CpuValues()
    memory: MemoryValues = MemoryValues()
    gpu: GpuValues = GpuValues()
    node_selector: dict[LabelKey, LabelValue] = Field({}, description="Labels that the node must carry")
    affinity: tuple[AffinityValues, ...] = Field(
        (), description="Nodes that are asked for (one of those without a weight) or preferred"
    )
    tolerations: tuple[TolerationValues, ...] = Field((), description="Taints that the step tolerates")
    retries: RetryValues = RetryValues()
    caching: bool = Field(
        True, description="Take the result of an earlier task with the same inputs; register never does"
    )
    env: dict[EnvName, str] = Field({}, description="Plain environment variables; no secrets")
    secrets: tuple[SecretValues, ...] = Field(
        (),
        description="Environment variables and files from Secrets; of those under defaults a step is given the "
        "credentials that it needs, and files",
    )
    config_maps: tuple[ConfigMapValues, ...] = Field(
        (), description="Environment variables and files from ConfigMaps"
    )
    cache: CacheValues = CacheValues()
    scratch: ScratchValues = ScratchValues()
    shm: Memory | None = Field(
        None,
        description="Size of a /dev/shm in memory, counted in the memory limit; train has 1Gi by default",
    )
    user: UserValues = UserValues()
    labels: dict[LabelKey, LabelValue] = Field({}, description="Labels of the step's pods")
    annotations: dict[LabelKey, str] = Field({}, description="Annotations of the step's pods")
    pull_secrets: tuple[Name, ...] = Field((), description="Existing image pull secrets")
    time_limit: Duration | None = Field(
        _TIME_LIMIT,
        description=f"An attempt that takes longer is ended and fails, the time to fetch its image included; train has "
        f"{_TRAIN_TIME_LIMIT} by default; null is no limit",
    )

    def retry_window(self) -> int:
        """Seconds after the first attempt's begin in which others may begin and run: `retries.max_backoff`.

        Where none is given, as many as all attempts take at most, and the waits between them.
        """
        retries = self.retries
        if retries.max_backoff:
            return seconds(retries.max_backoff)
        if self.time_limit is None:
            return _UNLIMITED_S
        wait = seconds(retries.backoff)
        waits = sum(wait * retries.factor**number for number in range(retries.attempts))
        return min(_UNLIMITED_S, math.ceil((retries.attempts + 1) * seconds(self.time_limit) + waits))

    @model_validator(mode="after")
    def _no_secrets_no_doubles(self) -> StepValues:
        for name, value in self.env.items():
            if _SECRET_NAME.search(name) or ("://" in value and holds_secret(value)):
                raise _At(("env", name), "…", "no secret in plain text; name a Secret under secrets")
        seen: set[str] = set(self.env)
        for kind in ("secrets", "config_maps"):
            for place, source in enumerate(getattr(self, kind)):
                for name in source.env:
                    if name in seen:
                        raise _At((kind, place, "env", name), source.env[name], "a variable that is set once")
                    seen.add(name)
        mounted: dict[str, tuple[str | int, ...]] = {}
        volumes: set[str] = set()
        for path, key, volume in self._mounts():
            if path in mounted:
                raise _At(key, path, f"a path of its own; {'.'.join(map(str, mounted[path]))} is there")
            if volume in volumes:
                raise _At(
                    (*key[:-1], "name"), volume, "a name that is mounted once; KFP names the volume after it"
                )
            mounted[path] = key
            volumes.add(volume)
        return self

    def _mounts(self) -> Iterator[tuple[str, tuple[str | int, ...], str]]:
        """Every mounted path, which key names it, and the name of its volume."""
        if self.cache.claim:
            yield self.cache.path, ("cache", "path"), self.cache.claim
        if self.scratch.size:
            yield self.scratch.path, ("scratch", "path"), SCRATCH
        if self.shm:
            yield "/dev/shm", ("shm",), "shm"
        for kind in ("secrets", "config_maps"):
            for number, source in enumerate(getattr(self, kind)):
                if source.mount:
                    yield source.mount, (kind, number, "mount"), source.name


class RunValues(_Part):
    """What belongs to a run. KFP's YAML has no place for the first four: `submit --values` passes them on."""

    service_account: Name | None = Field(None, description="Service account of the steps; given at submit")
    pipeline_root: PipelineRoot = Field(
        "", description="Where KFP keeps the steps' artifacts; given at submit; empty is KFP's own"
    )
    experiment: str = Field("spectraqlora", min_length=1, description="KFP experiment; given at submit")
    ui: WebAddress = Field(
        "",
        description="Address of KFP's UI, for links to runs; empty is the host's, which may be the API's alone",
    )
    time_limit: Duration | None = Field(
        _RUN_TIME_LIMIT,
        description="A run that takes longer is ended, the time in which its pods wait for a node included; null is "
        "no limit",
    )
    keep_finished: Duration | None = Field(
        None, description="How long the finished workflow object stays; KFP keeps the run's record anyway"
    )


class ArtifactRepository(_Part):
    config_map: Name | None = Field(
        None,
        description="ConfigMap that describes it, in the namespace of the runs; none is the controller's own",
    )
    key: str | None = Field(
        None, description="Key inside; none is the one that the ConfigMap's annotation names"
    )
    key_format: KeyFormat = Field(
        "{{workflow.name}}/{{pod.name}}",
        description="Where a step's artifacts are in it, by its pod's name; its own keyFormat is not used",
    )


class ArgoValues(_Part):
    """What Argo Workflows has a place for and Kubeflow Pipelines has not; for `--target argo` alone."""

    parallelism: int | None = Field(None, ge=1, description="Pods of a run at once; none is no limit")
    fs_group: int | None = Field(
        0, ge=0, description="Group that a step's volumes are given to; null leaves them as they are"
    )
    grace: Duration = Field(
        "2m",
        description="How long a step whose pod is deleted may take to end; training writes a checkpoint in it",
    )
    repository: ArtifactRepository = ArtifactRepository()
    timezone: str = Field("Etc/UTC", min_length=1, description="Time zone of a schedule's cron line")


class NodesValues(_Part):
    """A training on several machines (train.nodes): its TrainJob. Its pods get what `steps.train` says."""

    runtime: Name = Field(
        "spectraqlora-nodes",
        description="TrainingRuntime in the namespace of the runs; the chart makes it, and names it after the release",
    )
    queue: Name | None = Field(
        None, description="Kueue's queue that the job waits in; none starts it at once"
    )


class _At(ValueError):
    """A fault of a part of the model under validation."""

    def __init__(self, place: tuple[str | int, ...], value: object, expected: str) -> None:
        super().__init__(expected)
        self.place, self.value = place, value


def _known_step(name: str) -> str:
    if name not in step_names():
        raise ValueError(f"one of the steps {', '.join(step_names())}")
    return name


def _known_image(name: str) -> str:
    if name not in images():
        raise ValueError(f"one of the images {', '.join(images())}")
    return name


class ClusterValues(_Part):
    """The values file."""

    run: RunValues = RunValues()
    argo: ArgoValues = ArgoValues()
    nodes: NodesValues = NodesValues()
    digests: dict[Annotated[str, AfterValidator(_known_image)], Digest] = Field(
        {},
        description="By step image, such as train: its content, sha256:…; the steps that run in it are pinned to it, "
        "unless steps.NAME.image says a tag or another digest. MLflow's runs and the bill of materials name it",
    )
    defaults: StepValues = Field(StepValues(), description="Holds for every step")
    steps: dict[Annotated[str, AfterValidator(_known_step)], StepValues] = Field(
        {}, description="What differs for one step"
    )

    @model_validator(mode="after")
    def _steps_are_valid(self) -> ClusterValues:
        for place, secret in enumerate(self.defaults.secrets):
            if SIGNING_KEY in secret.env:
                expected = "a place under steps.merge-export.secrets: no other step signs"
                raise _At(
                    ("defaults", "secrets", place, "env", SIGNING_KEY), secret.env[SIGNING_KEY], expected
                )
        for name, own in self.steps.items():
            if name in NEVER_CACHED and "caching" in own.model_fields_set and own.caching:
                raise _At(("steps", name, "caching"), True, "false: the step reads or changes the registry")
            try:
                self.step(name)
            except ValidationError as error:
                key, value, expected = _first(error)
                raise _At(("steps", name, *key), value, f"{expected} (with the defaults)") from None
        return self

    def step(self, name: str) -> StepValues:
        """A step's values: its own over the defaults over what is built in; of the defaults' secrets those it needs."""
        defaults = self.defaults
        if defaults.secrets:
            needed = tuple(kept for secret in defaults.secrets if (kept := secret.for_step(name)))
            defaults = defaults.model_copy(update={"secrets": needed})
        merged = _BUILT_IN.get(name, {})
        for part in (defaults, self.steps.get(name)):
            if part is not None:
                merged = _merge(merged, part.model_dump(exclude_unset=True))
        named = self.steps[name].image.model_fields_set if name in self.steps else set[str]()
        if (digest := self.digests.get(own_image(name))) and not named & {"tag", "digest"}:
            merged = _merge(merged, {"image": {"digest": digest}})
        if name in NEVER_CACHED:
            merged["caching"] = False
        return StepValues.model_validate(merged)

    def short_windows(self) -> list[str]:
        """A line for each step that is not tried as often as it says, since its window is too short."""
        lines = []
        for name in step_names():
            step = self.step(name)
            limit = step.time_limit
            if not (step.retries.attempts and step.retries.max_backoff and limit):
                continue
            if step.retry_window() < seconds(limit):
                lines.append(
                    f"steps.{name}.retries.max_backoff: {step.retries.max_backoff}: an attempt may take {limit}, and "
                    "one that fails later than this after the first one's begin is not tried again; leave it out"
                )
        return lines


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value) if both else value
    return result


def read_values(path: Path) -> ClusterValues:
    """Read and check a values file.

    Raises:
        InputError: of the first fault, naming key, value and what was expected.
    """
    try:
        loaded = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise InputError("--values", path, "a readable YAML file") from None
    except ValueError as error:
        raise InputError("--values", path, f"valid YAML ({error})") from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise InputError(
            "--values", path, "a YAML mapping with run, argo, nodes, digests, defaults and steps"
        )
    try:
        return ClusterValues.model_validate(loaded)
    except ValidationError as error:
        key, value, expected = _first(error)
        raise InputError(".".join(map(str, key)), value, expected) from None


def _first(error: ValidationError) -> tuple[tuple[str | int, ...], object, str]:
    """Place, value and expectation of a validation's first fault."""
    fault = error.errors()[0]
    # Pydantic marks a mapping's faulty key by a part of its own.
    place = tuple(part for part in fault["loc"] if part != "[key]")
    inner = fault.get("ctx", {}).get("error")
    if isinstance(inner, _At):
        return (*place, *inner.place), inner.value, str(inner)
    if fault["type"] == "extra_forbidden" and place and place[-1] in LACKING:
        return place, fault["input"], f"{LACKING[str(place[-1])]}; {_WITHOUT_KFP}"
    if fault["type"] == "extra_forbidden":
        return place, fault["input"], f"a known key, one of: {', '.join(_keys_at(place[:-1]))}"
    if fault["type"] == "missing":
        return place, None, "a value; it is required"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    value = "the given mapping" if isinstance(fault["input"], _Part) else fault["input"]
    return place, value, message


def _keys_at(place: tuple[str | int, ...]) -> list[str]:
    model: Any = ClusterValues
    for part in place:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _part_of(model.model_fields[str(part)].annotation)
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def _part_of(annotation: Any) -> Any:
    """The section class inside an annotation such as tuple[SecretValues, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        part = _part_of(inner)
        if part is not None:
            return part
    return None


def reference() -> list[tuple[str, str, str]]:
    """Every key as (key, default, description); step values once, under `defaults`."""
    return list(_rows(ClusterValues, ""))


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        part = _part_of(field.annotation)
        plain = not isinstance(field.get_default(call_default_factory=True), BaseModel)
        if part is None or (part is StepValues and plain):
            yield key, _shown(field), field.description or ""
        elif plain:
            yield key, _shown(field), field.description or ""
            yield from _rows(part, f"{key}[].")
        else:
            yield from _rows(part, f"{key}.")


def _shown(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.get_default()
    if isinstance(default, str):
        return default or "''"
    return "none" if default is None else json.dumps(default)


def image_name(reference: str) -> str:
    """The name of a step image without its tag."""
    return reference.rpartition(":")[0]
