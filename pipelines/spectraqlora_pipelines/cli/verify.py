"""The command verify."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from spectraqlora import signing
from spectraqlora.errors import InputError

from spectraqlora_pipelines.cli.options import ConfigOrVariable, Set
from spectraqlora_pipelines.cli.registry import Uri, registry_settings
from spectraqlora_pipelines.cli.screen import console, line

REGISTERED = "models:/"


def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, s3:// address, models:/NAME@ALIAS or /VERSION.")
    ],
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Public key in PEM; else SPECTRAQLORA_VERIFYING_KEY."),
    ] = None,
    uri: Uri = "",
    config: ConfigOrVariable = None,
    set_: Set = None,
) -> None:
    """Compare every byte of a model with its signature.

    Exit code 0: it is what the owner of the key has signed; 2: it is not, or
    nobody has signed it.

    Example: spectraqlora verify models:/spectraqlora@champion --key key.pub
    """
    pem = signing.key_of(key, "--key") if key else signing.trusted_key()
    if not pem:
        raise InputError("--key", "", f"a public key in PEM, here or in {signing.VERIFYING_KEY}")
    with console.status(f"verifying {model}"), tempfile.TemporaryDirectory() as scratch:
        if model.startswith(REGISTERED):
            signed_by = _registered(model, pem, uri, config, set_)
        elif model.startswith("s3://"):
            from spectraqlora.storage import download_folder, parse_address

            folder = Path(scratch) / "model"
            download_folder(parse_address(model, "MODEL"), folder)
            _without_records(folder)
            signed_by = signing.verify(folder, pem, model)
        else:
            folder = Path(model).expanduser()
            if not folder.is_dir():
                raise InputError("MODEL", model, "a folder, an s3:// address, or models:/NAME@ALIAS")
            signed_by = signing.verify(folder, pem)
    line(f"{model} is what the key {signed_by[:16]} has signed.")


def _registered(model: str, pem: str, uri: str, config: Path | None, assignments: list[str] | None) -> str:
    from spectraqlora.tracking.registry import Registry
    from spectraqlora.tracking.signed_model import verify_version

    name, alias, which = model.removeprefix(REGISTERED).partition("@")
    if not alias:
        name, _, which = name.rpartition("/")
    if not name or not which or (not alias and not which.isdecimal()):
        raise InputError("MODEL", model, "models:/NAME@ALIAS or models:/NAME/VERSION")
    registry = Registry(registry_settings(uri, name, config, assignments).tracking)
    return verify_version(registry, registry.version(which if alias else int(which)), pem)


def _without_records(folder: Path) -> None:
    """Remove what the download notes for itself."""
    import shutil

    from spectraqlora.files import BOOKKEEPING

    shutil.rmtree(folder / BOOKKEEPING, ignore_errors=True)
