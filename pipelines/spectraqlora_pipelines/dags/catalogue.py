"""The pipelines by name: what each is compiled from, and its arguments from the settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import check_methods
from spectraqlora.places import kind_of
from spectraqlora.settings import Settings, digest

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
        write_yaml(dag(name, settings, Placement(values=values)), path)


def steps(name: Dag, settings: Settings) -> int:
    """How many steps a run has at most."""
    from spectraqlora_pipelines.dags.branch import unrolled

    check_methods(settings)
    if name == "ablation":
        return SHARED_STEPS + sum(1 + 2 * unrolled(method, settings.rounds) for method in settings.methods)
    branch = (
        1 + (settings.retrain.start == "champion") + 2 * unrolled(settings.retrain.method, settings.rounds)
    )
    return 1 + SHARED_STEPS + branch


def recipe(settings: Settings, base_content: str = "") -> str:
    """Digest of all that shapes a retrained model besides its data."""
    values = settings.model_dump(mode="json", include={*_RECIPE, "seed", "rounds"})
    values["base_content"] = base_content
    del values["data"]["source"]
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
        contents: digests of local base model and data, so that changed files are not taken from the cache.
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
        given["recipe"] = recipe(settings, contents.get("base_model", ""))
    elif "data" in contents:
        given["source_content"] = contents["data"]
    return given


def run_key(workdir: Path, settings: Settings, contents: dict[str, str]) -> str:
    """Name of a local run in MLflow; the same run again has the same."""
    identity = hashlib.sha256(json.dumps([digest(settings), contents], sort_keys=True).encode()).hexdigest()
    return f"{workdir.name}-{identity[:12]}"


def cluster_arguments(name: str, settings: Settings) -> dict[str, Any]:
    """A pipeline's arguments for a cluster.

    Raises:
        InputError: something that only this machine has.
    """
    kind = checked(name)
    settings.promote.check_measured()
    for key, value in (
        ("model.base_model", settings.model.base_model),
        ("data.source", settings.data.source),
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
    return arguments(kind, settings, settings.model.base_model, settings.data.source)


def write_yaml(pipeline: Any, path: Path) -> None:
    """Write a pipeline's YAML, the same text every time.

    The compiler's leading comments list dict defaults in random order; they go, the IR says the same.
    """
    from kfp import compiler

    compiler.Compiler().compile(pipeline, str(path))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")
