"""The merged model in the MLflow model registry, as challenger."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path

from spectraqlora.families import auto_class
from spectraqlora.settings import TrackingSettings

CHALLENGER = "challenger"
_REQUIREMENTS = ("torch", "transformers", "safetensors", "accelerate")


def register(
    settings: TrackingSettings, run_id: str, exported: Path, tags: dict[str, str], metrics: dict[str, float]
) -> tuple[str, int]:
    """Log `exported/merged` to the run and register it; (model name, version).

    A version of the same run with the same `merged_digest` tag is not registered twice.
    """
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    name = settings.registered_model
    mlflow.set_tracking_uri(settings.uri)
    client = MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)
    try:
        known = client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
    except MlflowException:
        known = []
    for candidate in known:
        if candidate.tags.get("merged_digest") == tags["merged_digest"]:
            client.set_registered_model_alias(name, CHALLENGER, candidate.version)
            return name, int(candidate.version)
    # MLflow's path for checkpoints on disk does not know this transformers; a loaded model works.
    from transformers import AutoConfig, AutoTokenizer

    merged = exported / "merged"
    config = AutoConfig.from_pretrained(merged)
    components = {
        "model": auto_class(config).from_pretrained(merged, use_safetensors=True),
        "tokenizer": AutoTokenizer.from_pretrained(merged),
    }
    with mlflow.start_run(run_id=run_id):
        info = mlflow.transformers.log_model(
            transformers_model=components,
            name="model",
            task="text2text-generation" if config.is_encoder_decoder else "text-generation",
            pip_requirements=[f"{package}=={installed(package)}" for package in _REQUIREMENTS],
            registered_model_name=name,
        )
    version = int(info.registered_model_version)
    for key, value in {**tags, **{k: f"{v:.6g}" for k, v in metrics.items()}}.items():
        client.set_model_version_tag(name, str(version), key, value)
    client.set_registered_model_alias(name, CHALLENGER, str(version))
    return name, version
