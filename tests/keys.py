"""Keys to sign with, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from spectraqlora import signing


def make_key(curve: Any = ec.SECP256R1) -> str:
    """A private key as PEM text."""
    return (
        ec.generate_private_key(curve())
        .private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        .decode()
    )


def write_keys(folder: Path) -> tuple[Path, Path]:
    """Files of a private and its public key."""
    private = make_key()
    (folder / "key.pem").write_text(private)
    (folder / "key.pub").write_text(signing.public_key(private))
    return folder / "key.pem", folder / "key.pub"
