"""A model in MLflow: logged in the transformers flavor, registered, downloaded and loaded again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import yaml

from spectraqlora.errors import InputError
from spectraqlora.files import name_fault
from spectraqlora.models.adapters import with_adapter
from spectraqlora.models.families import auto_class
from spectraqlora.models.hardware import compute_dtype
from spectraqlora.models.loading import load_plain, load_tokenizer
from spectraqlora.places import base_place, kind_of, read_document
from spectraqlora.settings import TrackingSettings
from spectraqlora.signing import SHARD_SIZE
from spectraqlora.tracking.registry import TAG_LENGTH, Version
from spectraqlora.tracking.server import explain_errors, fetching, transferring

_REQUIREMENTS = ("torch", "transformers", "safetensors", "accelerate")


def log_model(
    settings: TrackingSettings,
    run_id: str,
    exported: Path,
    trust: bool,
    example: str,
    tags: dict[str, str],
) -> str:
    """Log the exported model to a run, unless the run has it with the same tags; its id in MLflow.

    What a stopped attempt left half logged is deleted.

    Args:
        settings: the `tracking` section.
        run_id: run that keeps the model.
        exported: artifact of merge-export.
        trust: let code next to the model run.
        example: a prompt as the model was trained on it.
        tags: of the logged model; they say what it is.

    Raises:
        InputError: the adapter form was asked for, of a base that MLflow cannot refer to; or the server does
            not answer.
    """
    import mlflow

    with _as_default(settings), transferring(settings):
        client = mlflow.MlflowClient()
        for model in client.search_logged_models(
            [client.get_run(run_id).info.experiment_id], f"source_run_id = '{run_id}'"
        ):
            if model.status != "READY":
                client.delete_logged_model(model.model_id)
            elif tags.items() <= model.tags.items():
                return str(model.model_id)
        with mlflow.start_run(run_id=run_id):
            return str(_log(settings.registered_form, exported, trust, example, tags).model_id)


def _log(form: str, exported: Path, trust: bool, example: str, tags: dict[str, str]) -> Any:
    """Log to the active run; MLflow's description of the model."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from transformers import AutoConfig

    merged = exported / "merged"
    config = AutoConfig.from_pretrained(merged, trust_remote_code=trust)
    extra: dict[str, Any] = {}
    requirements = list(_REQUIREMENTS)
    if form == "adapter":
        model, base_folder = _base_with_adapter(config, exported / "adapter", trust)
        requirements.append("peft")
        extra = {"base_model_path": base_folder} if base_folder else {}
    else:
        # MLflow's path for checkpoints on disk does not know this transformers; a loaded model works.
        model = auto_class(config).from_pretrained(merged, use_safetensors=True, trust_remote_code=trust)
    text = Schema([ColSpec(DataType.string)])
    os.environ["MLFLOW_HUGGINGFACE_MODEL_MAX_SHARD_SIZE"] = SHARD_SIZE
    return mlflow.transformers.log_model(
        transformers_model={"model": model, "tokenizer": load_tokenizer(merged, trust)},
        name="model",
        task="text2text-generation" if config.is_encoder_decoder else "text-generation",
        pip_requirements=[f"{package}=={installed(package)}" for package in requirements],
        signature=ModelSignature(inputs=text, outputs=text),
        input_example=example,
        tags=tags,
        **extra,
    )


def register_model(settings: TrackingSettings, model_id: str, tags: dict[str, str]) -> int:
    """Make a logged model a version of the registered model; its number.

    MLflow's database takes a version and its tags in one piece: there are all or there is none.
    """
    import mlflow

    with _as_default(settings):
        cut = {key: value[:TAG_LENGTH] for key, value in tags.items()}
        version = mlflow.register_model(f"models:/{model_id}", settings.registered_model, tags=cut)
    return int(version.version)


def download_model(settings: TrackingSettings, version: Version, target: Path) -> Path:
    """Fetch a version's model; its folder below `target`."""
    import mlflow

    with _as_default(settings):
        client = mlflow.MlflowClient()
        location = client.get_model_version_download_uri(version.name, str(version.number))
        if location.startswith("models:/"):
            location = client.get_logged_model(location.removeprefix("models:/")).artifact_location
        with fetching(settings, f"{location}/MLmodel"):
            uri = f"models:/{version.name}/{version.number}"
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(target)))


@contextlib.contextmanager
def _as_default(settings: TrackingSettings) -> Iterator[None]:
    """Inside, MLflow's functions that take no address ask this server; its refusals become one line."""
    import mlflow

    mlflow.set_tracking_uri(settings.uri)
    mlflow.set_registry_uri(settings.uri)
    with explain_errors(settings):
        yield


def _base_with_adapter(config: Any, adapter: Path, trust: bool) -> tuple[Any, str]:
    """The base with the adapter on it, and the base's folder where it is one: MLflow keeps a reference to it."""
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"
    ]
    if kind_of(base) == "s3":
        raise InputError(
            "tracking.registered_form",
            "adapter",
            f"merged; a reference to {base} cannot be loaded by transformers",
        )
    model = auto_class(config).from_pretrained(base, use_safetensors=True, trust_remote_code=trust)
    return with_adapter(model, adapter), base if kind_of(base) == "path" else ""


def load_model(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a downloaded MLflow model: safetensors only, and no code from the registry runs.

    Whoever may write to the registry wrote these files: a part's folder must be below `folder`.

    Raises:
        InputError: the folder holds another flavor, a part that is elsewhere or not there, or a model with code
            of its own.
    """
    flavor = _flavor(folder)
    dtype = compute_dtype("auto")
    if "peft_adaptor" in flavor:
        base = flavor.get("local_base_model_path") or flavor.get("source_model_name")
        revision = flavor.get("source_model_revision") or "main"
        if not (isinstance(base, str) and isinstance(revision, str)):
            raise InputError("registered model's base", base, "a hub id or a folder")
        place = base_place(base, revision, field="registered model's base")
        plain = _without_own_code(place.local_copy())
        model = with_adapter(load_plain(plain, dtype), _part(folder, flavor, "peft_adaptor"))
    else:
        model = load_plain(_without_own_code(_part(folder, flavor, "model_binary")), dtype)
    return model.eval(), load_tokenizer(folder / "components" / "tokenizer")


def _flavor(folder: Path) -> dict[str, Any]:
    """What MLmodel says of the transformers flavor."""
    try:
        flavor = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))["flavors"]["transformers"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError):
        flavor = None
    if not isinstance(flavor, dict):
        raise InputError("registered model", folder, "an MLflow model of the transformers flavor")
    return flavor


def _part(folder: Path, flavor: dict[str, Any], key: str) -> Path:
    """The folder of a part of the model, by its name in MLmodel."""
    name = flavor.get(key)
    fault = name_fault(name) if isinstance(name, str) else "it is no text"
    if not fault and not (folder / str(name)).resolve().is_relative_to(folder.resolve()):
        fault = "it is a link that leads out"
    if not fault and not (folder / str(name)).is_dir():
        fault = "there is none"
    if fault:
        raise InputError(f"{folder}/MLmodel, {key}", name, f"a folder below that of the model; {fault}")
    return folder / str(name)


def _without_own_code(folder: Path) -> Path:
    """The folder; refused where loading its model would run code that comes with it."""
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    if "auto_map" in read_document(text, config, "registered model"):
        raise InputError(
            "registered model",
            folder,
            "a model without code of its own, which would have to run here to score it",
        )
    return folder
