"""Signatures of model folders, in the form of OpenSSF model signing: a Sigstore bundle made with a key, without network.

`model.sig` in a folder names the SHA-256 of every other file there. Whoever has the public key verifies it, with
`spectraqlora verify` or with OpenSSF's own program:

    model_signing verify key --signature merged/model.sig --ignore-paths merged/model.sig --public_key key.pub merged
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.errors import InputError

if TYPE_CHECKING:
    from model_signing import hashing

    from spectraqlora.settings import ExportSettings

SIGNATURE = "model.sig"
SHARD_SIZE = "2GB"
"""Of an exported model's weights, and of the same weights in MLflow: equal files, so that one signature is of both."""
SIGNING_KEY, VERIFYING_KEY = "SPECTRAQLORA_SIGNING_KEY", "SPECTRAQLORA_VERIFYING_KEY"
"""Environment variables: a private and a public key of an elliptic curve (P-256, P-384 or P-521), as the path of a PEM
file or as its text."""
REQUIRED = "required"
"""Value of `export.signature` with which nothing unsigned is exported, registered or promoted."""
_PEM = "-----BEGIN "
_EXPECTED = {
    SIGNING_KEY: "a private key of an elliptic curve (P-256, P-384 or P-521) in PEM, without a password",
    VERIFYING_KEY: "a public key of an elliptic curve (P-256, P-384 or P-521) in PEM",
}


def given_key(variable: str) -> str:
    """The key that an environment variable names or holds, as PEM text; empty where it is not set.

    Raises:
        InputError: a file that cannot be read, or no such key. The value is not repeated.
    """
    return key_in(variable, os.environ)


def key_in(variable: str, variables: Mapping[str, str]) -> str:
    """`given_key` of an environment that is not this process' own."""
    text = variables.get(variable, "").strip()
    return _checked(variable, text) if text else ""


def check_signing(settings: ExportSettings) -> str:
    """The private key to sign with, as PEM text; empty where none is given and none is required.

    Raises:
        InputError: one that cannot be used; or none where `export.signature` requires one.
    """
    key = given_key(SIGNING_KEY)
    if settings.signature == REQUIRED and not key:
        raise InputError("export.signature", REQUIRED, f"a private key in {SIGNING_KEY}")
    return key


def trusted_key() -> str:
    """The public key to verify with, as PEM text: the given one, else that of the key to sign with; else empty.

    Raises:
        InputError: one that cannot be used.
    """
    own = "" if os.environ.get(VERIFYING_KEY) else given_key(SIGNING_KEY)
    return public_key(own) if own else given_key(VERIFYING_KEY)


def key_of(place: Path, field: str) -> str:
    """A public key from a file, as PEM text.

    Raises:
        InputError: a file that cannot be read, or no such key.
    """
    return _checked(VERIFYING_KEY, str(place), field)


def _checked(variable: str, text: str, field: str = "") -> str:
    shown = "a key" if text.startswith(_PEM) else text
    try:
        pem = text if text.startswith(_PEM) else Path(text).expanduser().read_text(encoding="ascii")
        _public(pem)
        if ("PRIVATE" in pem) is not (variable == SIGNING_KEY):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise InputError(field or variable, shown, _EXPECTED[variable]) from None
    return pem


def _public(pem: str) -> Any:
    """The public key of a PEM text, private or public."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        if "PRIVATE" in pem:
            private = serialization.load_pem_private_key(pem.encode(), None)
            key: Any = private.public_key()
        else:
            key = serialization.load_pem_public_key(pem.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in (
        "secp256r1", "secp384r1", "secp521r1",
    ):  # fmt: skip
        raise ValueError("no key of these curves")
    return key


def public_key(pem: str) -> str:
    """The public key of a key, as PEM text."""
    from cryptography.hazmat.primitives import serialization

    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(_public(pem).public_bytes(serialization.Encoding.PEM, info).decode())


def fingerprint(pem: str) -> str:
    """SHA-256 of the public key's PEM text, in hex, as signatures name their key."""
    return hashlib.sha256(public_key(pem).encode()).hexdigest()


def sign(folder: Path, pem: str) -> None:
    """Write the signature of a folder's files into it.

    Raises:
        InputError: a link in the folder, which is not signed.
    """
    from model_signing import signing

    with _file(pem) as key:
        config = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(_hashing())
        try:
            config.sign(folder, folder / SIGNATURE)
        except ValueError as error:
            raise InputError("folder to sign", folder, f"files alone ({_line(error)})") from None


def verify(folder: Path, pem: str, shown: str = "") -> str:
    """Compare every byte of a folder with its signature; the fingerprint of the key that signed it.

    Args:
        folder: with `model.sig` in it.
        pem: the public key that is trusted.
        shown: how messages name the model.

    Raises:
        InputError: no signature, one of another key, or a file that was changed, added or removed.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying
    from pydantic import ValidationError

    shown = shown or str(folder)
    if not (folder / SIGNATURE).is_file():
        raise InputError("model", shown, f"a signed model; there is no {SIGNATURE}")
    signed_by = _signed_by(folder / SIGNATURE, shown)
    if signed_by != fingerprint(pem):
        raise InputError(
            "model", shown, f"a signature of the key {fingerprint(pem)[:16]}; it is of {signed_by[:16]}"
        )
    with _file(pem) as key:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_hashing())
        try:
            config.verify(folder, folder / SIGNATURE)
        except InvalidSignature:
            raise InputError("model", shown, "a signature that the key made; this one was changed") from None
        except ValidationError:
            raise InputError("model", shown, f"a readable signature in {SIGNATURE}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError("model", shown, f"the files that were signed; {_line(error)}") from None
    return signed_by


def _signed_by(signature: Path, shown: str) -> str:
    """Fingerprint of the key that a signature says that it is of."""
    try:
        document = json.loads(signature.read_text(encoding="utf-8"))
        base64.b64decode(document["dsseEnvelope"]["payload"], validate=True)
        return str(document["verificationMaterial"]["publicKey"]["hint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError("model", shown, f"a readable signature in {SIGNATURE}") from None


def _hashing() -> hashing.Config:
    """All files count but the signature, those of Git too, which the library leaves out otherwise."""
    from model_signing import hashing

    config = hashing.Config().use_file_serialization(ignore_paths=[Path(SIGNATURE)])
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


@contextlib.contextmanager
def _file(pem: str) -> Iterator[Path]:
    """A key as the file that the library asks for, readable to its owner alone, and only inside."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "key"
        path.touch(mode=0o600)
        path.write_text(pem, encoding="ascii")
        yield path


def _line(error: Exception) -> str:
    """The library's reason in one line: which files, without their digests."""
    text = " ".join(str(error).split())
    if changed := re.findall(r"Hash mismatch for \\*'(.*?)\\*': Expected", text):
        return f"changed: {', '.join(changed)}"[:160]
    return re.sub(r"[\[\]\"\\]", "", text).removeprefix("Signature mismatch: ")[:160] or type(error).__name__
