"""The signature of an exported model beside its copy in MLflow, and whether that copy is still what was signed.

MLflow writes the same weights, configs and tokenizer into folders of its own. `verify_version` puts them together again
as the export had them, with the files that MLflow does not take, and compares all with the signature.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from spectraqlora import signing
from spectraqlora.errors import InputError
from spectraqlora.files import link_or_copy
from spectraqlora.runtime.console import say, warn
from spectraqlora.tracking.registered_model import download_model
from spectraqlora.tracking.registry import Registry, Version
from spectraqlora.tracking.runs import Tracker

FOLDER = "signature"
"""Among the artifacts of a version's run: the signature, and what the export has besides its weights."""
SIGNED_BY = "signed_by"
"""Tag of a version: SHA-256 of the key that signed its export."""
_PARTS = ("model", "components/tokenizer")


def keep_signature(tracker: Tracker, run_id: str, merged: Path) -> None:
    """Keep an export's signature, and the export without its weights, in its run; nothing where it is not signed."""
    if (merged / signing.SIGNATURE).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            kept = Path(scratch) / FOLDER
            shutil.copytree(merged, kept, ignore=shutil.ignore_patterns("*.safetensors"))
            tracker.log_folder(run_id, kept, FOLDER)


def verify_version(registry: Registry, version: Version, key: str) -> str:
    """Compare a registered model with its export's signature; the fingerprint of the key.

    Args:
        registry: of the model.
        version: which one.
        key: the public key that is trusted, in PEM.

    Raises:
        InputError: it is not signed, or not by this key, or a byte of it changed; or the server does not answer.
    """
    shown = f"models:/{version.name}/{version.number}"
    if not version.tags.get(SIGNED_BY) or version.tags.get("registered_form") == "adapter":
        raise InputError("model", shown, "a version of a signed, merged model; it has no signature")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kept = registry.download(version, FOLDER, folder)
        model = download_model(registry.settings, version, folder / "model")
        for part in _PARTS:
            if (model / part).is_dir():
                shutil.copytree(model / part, kept, dirs_exist_ok=True, copy_function=_link)
        return signing.verify(kept, key, shown)


def check_signature(registry: Registry, version: Version, required: bool) -> None:
    """Refuse a version whose bytes changed since it was signed, and an unsigned one where signatures are required.

    Args:
        registry: of the model.
        version: the one that wants to be champion.
        required: whether `export.signature` says so.

    Raises:
        InputError: as `verify_version` does; or signatures are required and no key says whose.
    """
    key = signing.trusted_key()
    signed = bool(version.tags.get(SIGNED_BY))
    if required and not key:
        raise InputError(
            "export.signature", signing.REQUIRED, f"the public key to trust, in {signing.VERIFYING_KEY}"
        )
    if key and (signed or required):
        say(f"version {version.number} is signed by the key {verify_version(registry, version, key)[:16]}")
    elif signed:
        warn(f"version {version.number} is signed; no {signing.VERIFYING_KEY} is given to verify it with")


def _link(source: str, target: str) -> str:
    Path(target).unlink(missing_ok=True)
    return link_or_copy(source, target)
