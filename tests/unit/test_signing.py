"""Signatures of model folders: every byte counts, and the reference implementation agrees."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from spectraqlora import signing
from spectraqlora.errors import InputError
from spectraqlora.settings import ExportSettings

from tests.keys import make_key, write_keys


@pytest.fixture(scope="module")
def key() -> str:
    return make_key()


@pytest.fixture
def folder(tmp_path: Path, key: str) -> Path:
    made = tmp_path / "merged"
    for name, text in (("config.json", "{}"), (".gitattributes", "* text"), ("deep/er/weights", "0" * 5000)):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text)
    signing.sign(made, key)
    return made


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_was_signed_is_verified(folder: Path, key: str) -> None:
    assert signing.verify(folder, signing.public_key(key)) == signing.fingerprint(key)
    assert "PRIVATE" not in (folder / signing.SIGNATURE).read_text()
    assert (
        str(folder.parent)
        not in base64.b64decode(
            json.loads((folder / signing.SIGNATURE).read_text())["dsseEnvelope"]["payload"]
        ).decode()
    )


def test_openssfs_own_program_verifies_it(folder: Path, key: str, tmp_path: Path) -> None:
    (tmp_path / "pub").write_text(signing.public_key(key))
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        "--signature",
        str(folder / "model.sig"),
    ]
    command += ["--ignore-paths", str(folder / "model.sig"), "--no-ignore-git-paths"]
    command += ["--public_key", str(tmp_path / "pub"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    flip(folder / "config.json", 0)
    assert subprocess.run(command, capture_output=True, text=True).returncode == 1


CHANGES: dict[str, Callable[[Path], object]] = {
    "changed: config.json": lambda f: flip(f / "config.json", 0),
    "changed: deep/er/weights": lambda f: flip(f / "deep/er/weights", 4999),
    "changed: .gitattributes": lambda f: flip(f / ".gitattributes", 2),
    "Extra files found in model 'merged': .gitignore": lambda f: (f / ".gitignore").write_text(""),
    "Extra files found in model 'merged': new.py": lambda f: (f / "new.py").write_text("import os"),
    "Missing files in model 'merged': config.json": lambda f: (f / "config.json").unlink(),
    "symlink": lambda f: (f / "link").symlink_to("config.json"),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_byte_a_file_or_a_link_that_changed_is_refused_by_name(folder: Path, key: str, said: str) -> None:
    CHANGES[said](folder)
    with pytest.raises(InputError) as caught:
        signing.verify(folder, signing.public_key(key))
    assert said in str(caught.value) and "\n" not in str(caught.value) and "Digest" not in str(caught.value)


def test_no_byte_of_the_signature_can_be_changed(folder: Path, key: str) -> None:
    """Where a changed one is read at all, it does not hold; spaces between JSON's values say nothing."""
    public, path = signing.public_key(key), folder / signing.SIGNATURE
    signed = path.read_bytes()
    payload = json.loads(signed)["dsseEnvelope"]["payload"].encode()
    start = signed.index(payload)
    for place in range(start, start + len(payload) - 4, 97):
        flip(path, place)
        with pytest.raises(InputError):
            signing.verify(folder, public)
        path.write_bytes(signed)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 5000, '{"dsseEnvelope": {"payload": "?"}}'])
def test_a_signature_that_is_none_is_one_line(folder: Path, key: str, text: str) -> None:
    (folder / signing.SIGNATURE).write_text(text)
    with pytest.raises(InputError, match=r"a readable signature in model\.sig"):
        signing.verify(folder, signing.public_key(key))
    (folder / signing.SIGNATURE).unlink()
    with pytest.raises(InputError, match=r"there is no model\.sig"):
        signing.verify(folder, signing.public_key(key))


def test_another_key_is_refused_and_so_is_its_name_on_a_signature(folder: Path, key: str) -> None:
    other = make_key(ec.SECP384R1)
    with pytest.raises(InputError, match=signing.fingerprint(key)[:16]):
        signing.verify(folder, signing.public_key(other))
    path = folder / signing.SIGNATURE
    path.write_text(path.read_text().replace(signing.fingerprint(key), signing.fingerprint(other)))
    with pytest.raises(InputError):
        signing.verify(folder, signing.public_key(other))


def pem(private: object, password: bytes = b"") -> str:
    kind = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    return private.private_bytes(serialization.Encoding.PEM, form, kind).decode()  # type: ignore[attr-defined]


def test_keys_are_files_or_text_and_what_is_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path)
    for given in (str(private), private.read_text(), f"\n{private.read_text()}"):
        monkeypatch.setenv(signing.SIGNING_KEY, given)
        assert signing.fingerprint(signing.given_key(signing.SIGNING_KEY)) == signing.fingerprint(
            public.read_text()
        )
    (tmp_path / "binary").write_bytes(os.urandom(100))
    encrypted = pem(ec.generate_private_key(ec.SECP256R1()), b"word")
    wrong = [
        *(str(public), str(tmp_path), str(tmp_path / "gone"), str(tmp_path / "binary"), "-----BEGIN nothing"),
        *(encrypted, pem(ec.generate_private_key(ec.SECP256K1())), pem(ed25519.Ed25519PrivateKey.generate())),
        pem(rsa.generate_private_key(65537, 2048)),
    ]
    for given in wrong:
        monkeypatch.setenv(signing.SIGNING_KEY, given)
        with pytest.raises(InputError, match=r"SPECTRAQLORA_SIGNING_KEY.*a private key") as caught:
            signing.check_signing(ExportSettings())
        assert "BEGIN" not in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv(signing.VERIFYING_KEY, str(private))
    with pytest.raises(InputError, match="a public key"):
        signing.given_key(signing.VERIFYING_KEY)


def test_without_a_key_nothing_is_signed_unless_that_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(signing.SIGNING_KEY, raising=False)
    assert signing.check_signing(ExportSettings()) == ""
    with pytest.raises(InputError, match=r"export\.signature: 'required': expected a private key"):
        signing.check_signing(ExportSettings(signature="required"))


def test_who_signs_trusts_their_own_key_unless_another_is_given(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(signing.VERIFYING_KEY, raising=False)
    monkeypatch.delenv(signing.SIGNING_KEY, raising=False)
    assert signing.trusted_key() == ""
    monkeypatch.setenv(signing.SIGNING_KEY, key)
    assert signing.trusted_key() == signing.public_key(key)
    other = signing.public_key(make_key())
    monkeypatch.setenv(signing.VERIFYING_KEY, other)
    assert signing.trusted_key() == other.strip()
