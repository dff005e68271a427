"""What the commands promote and models have in common: the registered model that they speak of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from spectraqlora.errors import InputError
from spectraqlora.runtime.cache import plainly_named
from spectraqlora.settings import Settings

from spectraqlora_pipelines.cli.options import load_settings

Uri = Annotated[
    str,
    typer.Option(
        metavar="URI",
        envvar="MLFLOW_TRACKING_URI",
        show_envvar=False,
        help="MLflow server, or the workdir of a local run.",
    ),
]
Name = Annotated[str, typer.Option(metavar="NAME", help="Registered model; else that of the settings.")]
SIGN_IN = (
    "MLFLOW_TRACKING_URI takes the place of --uri; MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD sign in to the server."
)
"""The end of these commands' help."""


def registry_settings(uri: str, name: str, config: Path | None, assignments: list[str] | None) -> Settings:
    """Settings whose tracking is the server, or the local run's database, at `uri`.

    Raises:
        InputError: `uri` is neither, or there is none anywhere.
    """
    database = Path(uri, "mlflow.db").expanduser()
    if uri and "://" not in uri:
        if not database.is_file():
            raise InputError("--uri", uri, "the address of an MLflow server, or the workdir of a local run")
        uri = f"sqlite:///{plainly_named(database.parent)}/mlflow.db"
    given = {"tracking.uri": uri or None, "tracking.registered_model": name or None}
    settings = load_settings(config, given, assignments)
    if not settings.tracking.uri:
        raise InputError("--uri", "", "the address of an MLflow server, or the workdir of a local run")
    return settings
