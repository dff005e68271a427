"""A signed model in a folder, in a bucket and in MLflow: a byte that changed is refused by verify and by promote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from spectraqlora import signing
from spectraqlora.artifacts import MergedModel
from spectraqlora.errors import InputError
from spectraqlora.settings import EvaluateSettings, PromoteSettings, TrackingSettings
from spectraqlora.steps.promote.promotion import Promotion, rollback
from spectraqlora.steps.register.register import Inputs, register
from spectraqlora.storage import parse_address, upload_folder
from spectraqlora.tracking.registry import Registry
from spectraqlora.tracking.runs import Tracker
from spectraqlora_pipelines.cli import app
from typer.testing import CliRunner

from tests.keys import write_keys
from tests.s3 import BUCKET, Server, environment


def verify(*arguments: str) -> str:
    done = CliRunner().invoke(app.app, ["verify", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.fixture
def signed(exported: Path, tmp_path: Path) -> Path:
    """An export, signed with the key beside it."""
    folder = tmp_path / "exported"
    shutil.copytree(exported, folder)
    private, public = write_keys(tmp_path)
    (folder / "merged" / "README.md").write_text("# card")
    signing.sign(folder / "merged", private.read_text())
    by = signing.fingerprint(public.read_text())
    MergedModel.read(folder).model_copy(update={"signed_by": by}).write(folder)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_registered_model_is_verified_and_not_promoted_when_a_byte_changed(
    signed: Path, exported: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, key = f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "key.pub")
    settings = TrackingSettings(uri=uri, registered_model="faq")
    register(Tracker(settings, "signed"), Inputs(prepared, signed, signed), {})
    assert "is what the key" in verify("models:/faq@challenger", "--key", key, "--uri", uri)
    monkeypatch.setenv(signing.VERIFYING_KEY, (tmp_path / "key.pub").read_text())
    assert "is what the key" in verify("models:/faq/1", "--uri", uri)

    def promotion(version: int, required: bool = True) -> Promotion:
        registry = Registry(settings)
        return Promotion(registry, registry.version(version), PromoteSettings(), EvaluateSettings(), required)

    for part in ("model/model.safetensors", "model/config.json", "components/tokenizer/tokenizer.json"):
        (path,) = (tmp_path / "mlartifacts").rglob(f"artifacts/{part}")
        content = path.read_bytes()
        flip(path)
        with pytest.raises(InputError, match=f"changed: {path.name}"):
            verify("models:/faq@challenger", "--uri", uri)
        for force in ("", "all the same"):
            with pytest.raises(InputError, match=f"changed: {path.name}"):
                promotion(1, required=False).run(force=force)
        path.write_bytes(content)
    assert Registry(settings).by_alias("champion") is None
    assert promotion(1).run().promoted

    register(Tracker(settings, "unsigned"), Inputs(prepared, exported, exported), {})
    with pytest.raises(InputError, match="it has no signature"):
        promotion(2).run(force="all the same")
    with pytest.raises(InputError, match="it has no signature"):
        verify("models:/faq/2", "--uri", uri)
    assert promotion(2, required=False).run(dry_run=True).decision == "not promoted"
    monkeypatch.delenv(signing.VERIFYING_KEY)
    with pytest.raises(InputError, match=r"export\.signature: 'required': expected the public key"):
        promotion(1).run()


def test_a_rollback_refuses_a_version_of_which_a_byte_changed(
    signed: Path, exported: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db", registered_model="faq")
    registry = Registry(settings)
    for key, folder in (("signed", signed), ("unsigned", exported), ("last", exported)):
        number = int(register(Tracker(settings, key), Inputs(prepared, folder, folder), {})[1])
        given = Promotion(registry, registry.version(number), PromoteSettings(), EvaluateSettings())
        assert given.run(force="for the test").promoted
    monkeypatch.setenv(signing.VERIFYING_KEY, (tmp_path / "key.pub").read_text())

    def rolled_back(*more: str) -> object:
        arguments = ["promote", "rollback", "--uri", settings.uri, "--name", "faq", *more]
        monkeypatch.setattr("sys.argv", ["spectraqlora", *arguments])
        with pytest.raises(SystemExit) as end:
            app.main()
        return end.value.code

    with pytest.raises(InputError, match="it has no signature"):
        rollback(registry, "slow", signature_required=True)
    assert rolled_back("--set", "export.signature=required") == 2
    assert _champion(registry) == 3, "nothing moved"
    assert rollback(registry, "slow").version == 2, "unsigned, and no signature is asked for"
    copies = (tmp_path / "mlartifacts").rglob("artifacts/model/model.safetensors")
    path = min(copies, key=lambda path: path.stat().st_mtime_ns)
    content = path.read_bytes()
    flip(path)
    for dry_run in (True, False):
        with pytest.raises(InputError, match=r"changed: model\.safetensors"):
            rollback(registry, "slow", dry_run)
    assert rolled_back() == 2 and _champion(registry) == 2
    path.write_bytes(content)
    assert rollback(registry, "slow").version == 1 and _champion(registry) == 1


def _champion(registry: Registry) -> int:
    champion = registry.by_alias("champion")
    assert champion is not None
    return champion.number


def test_a_folder_and_a_published_folder_are_verified(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("--key", str(tmp_path / "key.pub"))
    assert "is what the key" in verify(str(signed / "merged"), *key)
    with Server(tmp_path / "s3") as server:
        for name, value in environment(server.endpoint).items():
            monkeypatch.setenv(name, value)
        address = f"s3://{BUCKET}/faq/merged"
        plain = upload_folder(signed / "merged", parse_address(address))
        assert f"{address} is what the key" in verify(address, *key)
        flip(server.folder / plain.removeprefix("s3://") / "config.json")
        server.forget()
        for changed in (address, plain):  # The first by its manifest's digest already.
            with pytest.raises(InputError, match=r"config\.json"):
                verify(changed, *key)
    flip(signed / "merged" / "config.json")
    with pytest.raises(InputError, match=r"changed: config\.json"):
        verify(str(signed / "merged"), *key)


def test_what_cannot_be_verified_is_one_line(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        signing.VERIFYING_KEY,
        signing.SIGNING_KEY,
        "MLFLOW_TRACKING_URI",
    ):  # MLflow's client sets the second one.
        monkeypatch.delenv(name, raising=False)
    key = ("--key", str(tmp_path / "key.pub"))
    for arguments, said in (
        ((str(signed / "merged"),), "--key"),
        ((str(signed / "merged"), "--key", str(tmp_path / "key.pem")), "a public key"),
        ((str(signed), *key), r"there is no model\.sig"),
        ((str(tmp_path / "gone"), *key), "MODEL"),
        (("models:/faq", *key), "MODEL"),
        (("models:/faq/first", *key), "MODEL"),
        (("models:/faq@champion", *key), "--uri"),
    ):
        with pytest.raises(InputError, match=said):
            verify(*arguments)
