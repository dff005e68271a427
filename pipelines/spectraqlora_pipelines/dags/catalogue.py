"""The pipelines by name: what each is compiled from, and its arguments from the settings."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import yaml
from spectraqlora.errors import InputError
from spectraqlora.files import write_text
from spectraqlora.methods.catalogue import check_methods
from spectraqlora.places import Place, base_place, data_place, file_place, joined_contents, kind_of
from spectraqlora.runtime.console import warn
from spectraqlora.settings import Settings, digest

from spectraqlora_pipelines.cluster.values import METHOD

if TYPE_CHECKING:
    from spectraqlora_pipelines.cluster.values import ClusterValues
    from spectraqlora_pipelines.dags.placement import Placement

Dag = Literal["ablation", "retraining"]
_SECTIONS = (
    "model",
    "data",
    "snr",
    "select",
    "train",
    "evaluate",
    "tracking",
    "promote",
    "checkpoint",
    "export",
)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NEXT = "\n---\n"
SHARED_STEPS = 8
"""Steps of every pipeline outside its branches: `shared_steps` makes them."""
CLUSTER_CHECKPOINT_MINUTES = 3.0
"""checkpoint.every_minutes where nothing else is given: a pod that goes is not asked to save what it has first."""
_RECIPE = ("model", "data", "snr", "select", "train", "retrain")
_DESCRIPTIONS: dict[Dag, str] = {
    "ablation": "QLoRA and Spectrum ablations, from base to registry",
    "retraining": "Retrain when data or settings changed, promote by the gate",
}


def checked(name: str) -> Dag:
    """A pipeline's name."""
    if name not in get_args(Dag):
        raise InputError("--pipeline", name, " or ".join(get_args(Dag)))
    return cast(Dag, name)


def describe(name: Dag) -> str:
    """A pipeline in one sentence."""
    return _DESCRIPTIONS[name]


def dag(name: Dag, settings: Settings, place: Placement) -> Any:
    """The pipeline for these settings, its tasks placed by `place`.

    Raises:
        InputError: the settings name a method that there is not.
    """
    from spectraqlora_pipelines.dags.ablation import ablation_pipeline
    from spectraqlora_pipelines.dags.retraining import retraining_pipeline

    check_methods(settings)
    if name == "ablation":
        return ablation_pipeline(settings.methods, settings.rounds, place, settings.snr.source)
    return retraining_pipeline(
        settings.retrain.method, settings.rounds, settings.retrain.start, place, settings.snr.source
    )


def compile_dag(path: Path, name: Dag, settings: Settings, values: ClusterValues | None = None) -> None:
    """Write a pipeline's YAML, for a cluster where its values are given."""
    import warnings

    from spectraqlora_pipelines.dags.placement import Placement

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_yaml(dag(name, settings, Placement(values=values, nodes=settings.train.nodes)), path)


def steps(name: Dag, settings: Settings) -> int:
    """How many steps a run on this machine has at most."""
    from spectraqlora_pipelines.dags.branch import unrolled

    check_methods(settings)
    if name == "ablation":
        return SHARED_STEPS + sum(1 + 2 * unrolled(method, settings.rounds) for method in settings.methods)
    branch = (
        1 + (settings.retrain.start == "champion") + 2 * unrolled(settings.retrain.method, settings.rounds)
    )
    return 1 + SHARED_STEPS + branch


def recipe(settings: Settings) -> str:
    """Digest of the settings that shape a retrained model; detect-changes adds what base and table hold."""
    values = settings.model_dump(mode="json", include={*_RECIPE, "seed", "rounds"})
    for part in (values["data"], *values["data"]["sources"]):
        del part["source"]
    del values["train"]["nodes"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def arguments(
    name: Dag, settings: Settings, base_model: str, source: str, contents: dict[str, str] | None = None
) -> dict[str, Any]:
    """A pipeline's arguments.

    Args:
        name: of the pipeline.
        settings: of the run.
        base_model: where the steps find the base model.
        source: where they find the data.
        contents: digests of base model, data and SNR table, so that what changed is not taken from the cache.
    """
    if name == "retraining":
        # Rows that moved from one side to the other as data grows would favour the champion, who learned them.
        data = settings.data.model_copy(update={"split_by": "content"})
        settings = settings.model_copy(update={"data": data})
    contents = contents or {}
    sections = settings.model_dump(mode="json", include=set(_SECTIONS))
    given: dict[str, Any] = {
        "base_model": base_model,
        "source": source,
        "seed": settings.seed,
        **{key: sections[key] for key in _SECTIONS},
    }
    if "snr_table" in contents:
        given["table_content"] = contents["snr_table"]
    if "base_model" in contents:
        given["base_content"] = contents["base_model"]
    if name == "retraining":
        given["recipe"] = recipe(settings)
    elif "data" in contents:
        given["source_content"] = contents["data"]
    return given


def run_key(workdir: Path, settings: Settings, contents: dict[str, str]) -> str:
    """Name of a local run in MLflow; the same run again has the same."""
    identity = hashlib.sha256(json.dumps([digest(settings), contents], sort_keys=True).encode()).hexdigest()
    return f"{workdir.name}-{identity[:12]}"


def cluster_arguments(
    name: str, settings: Settings, unseen: Callable[[str], None] | None = warn
) -> dict[str, Any]:
    """A pipeline's arguments for a cluster, with the digests of what base model, data and SNR table hold now.

    Retraining's first step looks by itself, since a schedule's arguments are older than its runs.

    Args:
        name: of the pipeline.
        settings: of the run.
        unseen: is told what cannot be seen from here, and goes without a digest; None looks at nothing.

    Raises:
        InputError: something that only this machine has.
    """
    kind = checked(name)
    settings.promote.check_measured()
    if settings.train.nodes > 1 and not settings.checkpoint.destination:
        raise InputError(
            "checkpoint.destination",
            "",
            f"an s3:// address, where train.nodes={settings.train.nodes} machines find inputs and checkpoints",
        )
    for key, value in (
        ("model.base_model", settings.model.base_model),
        *(("data.source", part.source) for part in settings.data.parts),
    ):
        what = kind_of(value)
        if what == "sample" or (what == "path" and not value.startswith("/")):
            raise InputError(
                key, value, "a hub id, an s3:// address, or an absolute path on a volume of the steps"
            )
    uri = settings.tracking.uri
    if not uri.startswith(("http://", "https://", "databricks")):
        raise InputError("tracking.uri", uri, "the address of an MLflow server that the steps can reach")
    if "every_minutes" not in settings.checkpoint.model_fields_set:
        checkpoint = settings.checkpoint.model_copy(update={"every_minutes": CLUSTER_CHECKPOINT_MINUTES})
        settings = settings.model_copy(update={"checkpoint": checkpoint})
    contents = _contents(settings, unseen) if unseen and kind == "ablation" else {}
    return arguments(kind, settings, settings.model.base_model, settings.data.named, contents)


def _contents(settings: Settings, unseen: Callable[[str], None]) -> dict[str, str]:
    """Digests of what a run on a cluster reads, as far as it can be seen from here."""
    model, table = settings.model, settings.snr.table
    inputs: list[tuple[str, str, str, Callable[[], Place]]] = [
        ("base_model", "model.base_model", model.base_model,
         lambda: base_place(model.base_model, model.revision, model.trust_remote_code)),
        *(
            ("data", "data.source", part.source, functools.partial(data_place, part.source))
            for part in settings.data.parts
        ),
    ]  # fmt: skip
    if table:
        inputs.append(("snr_table", "snr.table", table, lambda: file_place(table, "snr.table")))
    found: dict[str, list[str]] = {}
    for name, key, value, place in inputs:
        if kind_of(value) == "path":
            reason = f"{key}: {value!r}: on a volume of the steps, not seen from here"
        else:
            try:
                found.setdefault(name, []).append(place().digest())
                continue
            except InputError as error:
                reason = f"{error}; not seen from here"
        unseen(f"{reason}: what reads it takes nothing from an earlier run")
        found.setdefault(name, []).append("")
    return {name: joined_contents(digests) for name, digests in found.items() if all(digests)}


def readers_without_digest(name: Dag, settings: Settings, given: dict[str, Any]) -> set[str]:
    """The steps that read what `given`, a pipeline's arguments, has no digest of.

    Taken from an earlier run, their result may be of what was there then.
    """
    if name == "retraining":
        return set()
    readers = {"base_content": "quantize-load", "source_content": "prepare-data"}
    if settings.snr.table:
        readers["table_content"] = "snr-analyze"
    return {step for key, step in readers.items() if not given.get(key)}


def without_cache(package: Path, steps: Collection[str] = ()) -> None:
    """Change a compiled pipeline so that the tasks of these steps, or all, take nothing from an earlier run.

    What reads a result that was made again is not taken from one either: KFP knows artifacts by their ids.

    Raises:
        InputError: it is no compiled pipeline.
    """
    try:
        documents = list(yaml.safe_load_all(package.read_text(encoding="utf-8")))
        parts = [documents[0]["root"], *documents[0]["components"].values()]
        tasks = [task for part in parts for task in part.get("dag", {}).get("tasks", {}).values()]
        for task in tasks:
            step = re.sub(r"-\d+$", "", task["componentRef"]["name"].removeprefix("comp-"))
            if not steps or step in steps:
                task["cachingOptions"] = {}
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        raise InputError("--package", package, "a pipeline YAML written by `spectraqlora compile`") from None
    package.write_text(yaml.safe_dump_all(documents, sort_keys=False), encoding="utf-8")


def write_yaml(pipeline: Any, path: Path) -> None:
    """Write a pipeline's YAML, the same text every time, its pods labelled with the method of their branch.

    The compiler's leading comments list dict defaults in random order; they go, the IR says the same.
    """
    from kfp import compiler

    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch) / path.name
        compiler.Compiler().compile(pipeline, str(compiled))
        lines = compiled.read_text(encoding="utf-8").splitlines(keepends=True)
    text, separator, platform = "".join(line for line in lines if not line.startswith("#")).partition(_NEXT)
    if separator:
        labelled = _label_methods(yaml.load(text, Loader=_LOADER), yaml.load(platform, Loader=_LOADER))
        platform = yaml.safe_dump(labelled, sort_keys=True)
    write_text(path, text + separator + platform)


def _label_methods(pipeline: dict[str, Any], platform: dict[str, Any]) -> dict[str, Any]:
    """Write each branch's method on its pods.

    Not by `kubernetes.add_pod_label`: where several nested pipelines have the same step, KFP's compiler merges what
    their executors are told before it renames them, so that they get each other's.
    """
    components = pipeline["components"]
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    parts = [pipeline["root"], *components.values()]
    for task in [task for part in parts for task in part.get("dag", {}).get("tasks", {}).values()]:
        given = task.get("inputs", {}).get("parameters", {}).get("method", {})
        method = given.get("runtimeValue", {}).get("constant")
        for inner in (
            components[task["componentRef"]["name"]].get("dag", {}).get("tasks", {}).values()
            if method
            else []
        ):
            executor = executors[components[inner["componentRef"]["name"]]["executorLabel"]]
            executor["podMetadata"]["labels"][METHOD] = method
    return platform
