"""Registered versions for tests that look at numbers and aliases, not at models."""

from __future__ import annotations

from typing import Any

from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.registry import CHALLENGER, COMPLETING_TAG, OWN_TAG, Registry


def registry(uri: str, name: str) -> Registry:
    return Registry(TrackingSettings(uri=uri, experiment="registry tests", registered_model=name))


def register(registry: Registry, *, loss: float, rows: str = "rows", **tags: Any) -> int:
    """A version that was scored on the eval rows of that digest, as the register step leaves it."""
    from mlflow.exceptions import MlflowException

    client = registry.client
    known = client.get_experiment_by_name(registry.settings.experiment)
    experiment = known.experiment_id if known else client.create_experiment(registry.settings.experiment)
    run = client.create_run(experiment).info.run_id
    try:
        client.create_registered_model(registry.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    number = int(client.create_model_version(registry.name, f"runs:/{run}/model", run).version)
    given = {
        OWN_TAG: run,
        COMPLETING_TAG: loss,
        "eval_digest": rows,
        "tokenizer_digest": "tokens",
        "method": "hybrid",
        **tags,
    }
    registry.tag(number, {key: str(value) for key, value in given.items()})
    registry.set_alias(CHALLENGER, number)
    return number
