"""`spectraqlora gc` on a real S3 server, and the MLflow that says what is still needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.storage import parse_address, upload_folder
from spectraqlora_pipelines.cli import app
from typer.testing import CliRunner

from tests import s3
from tests.mlflow_server import MlflowServer, basic_auth
from tests.retained import ROOT, Bucket, Known, place
from tests.s3 import BUCKET, Fault, Proxy, Server, environment

Gc = Callable[..., str]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(tmp_path / "s3") as running:
        for name, value in environment(running.endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("COLUMNS", "80")
        yield running


@pytest.fixture
def bucket(server: Server) -> Bucket:
    return Bucket(server)


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: to make one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    Known(place(folder)).run()
    return folder / "mlflow.db"


@pytest.fixture
def known(tmp_path: Path, migrated: Path) -> Known:
    (tmp_path / "mlflow.db").write_bytes(migrated.read_bytes())
    return Known(place(tmp_path))


@pytest.fixture
def gc(known: Known) -> Gc:
    def run(*arguments: str, address: str = f"s3://{BUCKET}") -> str:
        done = CliRunner().invoke(app.app, ["gc", address, "--uri", known.settings.uri, *arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0
        return done.output

    return run


def test_artifacts_go_that_no_version_alias_or_later_run_needs(bucket: Bucket, known: Known, gc: Gc) -> None:
    old, registered, champion, archived, recent = (known.run() for _ in range(5))
    base = bucket.artifact(old, "quantize-load", "four_bit", 90)
    table = bucket.artifact(old, "snr-analyze", "table", 90, [base])
    unused = bucket.artifact(old, "train", "adapter", 90, [base, table])
    export = bucket.artifact(registered, "merge-export", "exported", 80, [base])
    rest = bucket.artifact(registered, "train", "adapter", 80, [base])
    ranks = bucket.artifact(champion, "select-layers", "rank_map", 70, [table])
    dropped = bucket.artifact(archived, "merge-export", "exported", 70, [base])
    new = bucket.artifact(recent, "train", "adapter", 1, [base])
    known.version(registered, export_uri=export)
    best = bucket.artifact(champion, "merge-export", "exported", 70, [ranks])
    known.version(champion, alias="champion", export_uri=best)
    known.version(archived, stage="Archived", export_uri=dropped)
    strangers = {
        bucket.put(f"{ROOT}/somebodys-pipeline/{old}/train/{old}/model/x", "x", 300),
        bucket.put("mlflow/1/artifacts/model.safetensors", "x", 300),
        bucket.put("notes.txt", "x", 300),
    }
    before = bucket.names()

    shown = gc()
    assert bucket.names() == before, "nothing is deleted without --delete"
    assert "Nothing is deleted yet" in shown and f"gc s3://{BUCKET} --uri" in shown and "--delete" in shown
    assert "Stays: 3, 3 B: no artifact, checkpoint or export of this project" in shown
    assert "the export of spectraqlora version 1" in shown
    assert "of the run of spectraqlora version 2 (champion)" in shown
    assert "Can go: 3," in shown

    assert f"Deleted s3://{BUCKET}/{ROOT}/spectraqlora-ablation/{old}" in gc("--delete")
    left = bucket.names()
    folders = {uri: uri.removeprefix(f"minio://{BUCKET}/") for uri in (
        base, table, unused, export, rest, ranks, best, dropped, new)}  # fmt: skip
    stays = {uri for uri, folder in folders.items() if any(key.startswith(folder) for key in left)}
    assert stays == {base, table, export, ranks, best, new}
    assert strangers <= left and "Nothing can go." in gc("--delete")


def test_nothing_that_a_run_under_way_may_take_goes(bucket: Bucket, known: Known, gc: Gc) -> None:
    bucket.artifact(known.run(), "quantize-load", "four_bit", 400)
    bucket.checkpoint("a" * 32, 400)
    known.training("a" * 32, status="KILLED")
    under_way = known.run(status="RUNNING")
    before = bucket.names()
    shown = gc("--delete", "--older-than", "0m", "--unknown")
    assert bucket.names() == before and f"may be taken up by a run that is under way: {under_way}" in shown
    known.end(under_way)
    gc("--delete")
    assert bucket.names() == set()


def test_what_mlflow_does_not_know_goes_only_where_that_is_asked_for(
    bucket: Bucket, known: Known, gc: Gc
) -> None:
    bucket.artifact("5f0c6f0e-3d5f-4c5e-9d3b-2d0b0c1d9a7e", "quantize-load", "four_bit", 90)
    bucket.checkpoint("b" * 32, 90)
    before = bucket.names()
    assert "Stays: 2, 1.8 KiB: MLflow does not know" in gc("--delete") and bucket.names() == before
    gc("--delete", "--unknown")
    assert bucket.names() == set()


def test_a_run_with_the_tag_keep_stays(bucket: Bucket, known: Known, gc: Gc) -> None:
    made = bucket.artifact(known.run(), "quantize-load", "four_bit", 90)
    bucket.artifact(known.run(tags={"spectraqlora.keep": "for the audit"}), "train", "adapter", 80, [made])
    before = bucket.names()
    assert "of a run that has the tag spectraqlora.keep" in gc("--delete") and bucket.names() == before


def test_artifacts_that_do_not_say_what_they_were_made_from_keep_all_that_are_older(
    bucket: Bucket, known: Known, gc: Gc
) -> None:
    bucket.artifact(known.run(), "quantize-load", "four_bit", 90)
    bucket.artifact(known.run(), "train", "adapter", 1, silent=True)
    before = bucket.names()
    assert "do not say what they were made from" in gc("--delete") and bucket.names() == before


def test_a_version_that_does_not_name_its_export_keeps_every_export(
    bucket: Bucket, known: Known, gc: Gc
) -> None:
    """Its run took the export from an earlier run: of a program that did not write where from."""
    known.version(known.run(), alias="")
    first, second = known.run(), known.run()
    exports = {bucket.artifact(run, "merge-export", "exported", 90) for run in (first, second)}
    bucket.artifact(first, "train", "adapter", 90)
    assert "may be the export of spectraqlora version 1" in gc("--delete")
    assert len(bucket.names()) == 3 * len(exports)


def test_checkpoints_go_when_their_training_is_finished_or_given_up(
    bucket: Bucket, known: Known, gc: Gc
) -> None:
    finished, given_up, new = ("0" * 32, "1" * 32, "2" * 32)
    known.training(finished)
    known.training(given_up, status="FAILED")
    for training, days in ((finished, 40), (given_up, 40), (new, 2)):
        bucket.checkpoint(training, days)
    shown = gc("--delete")
    assert "checkpoints: its training is finished" in shown
    assert "checkpoints: nobody took up this training since" in shown
    assert {key.split("/")[1] for key in bucket.names()} == {new}


def test_a_published_export_goes_when_no_version_names_it(
    bucket: Bucket, known: Known, gc: Gc, tmp_path: Path
) -> None:
    addresses = {}
    for name in ("replaced", "kept", "unregistered"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    for name, where in (("replaced", "faq"), ("kept", "faq"), ("unregistered", "old")):
        address = parse_address(f"s3://{BUCKET}/exports/{where}/merged")
        addresses[name] = upload_folder(tmp_path / name, address)
        known.run(tags={"published.merged": addresses[name]})
    known.version(known.run(), **{"published.merged": addresses["kept"]})
    bucket.age("exports", 60)
    shown = gc("--delete", address=f"s3://{BUCKET}/exports")
    assert "a published export: another one was published since" in shown
    assert "a published export: no registered version names it" in shown
    kept = addresses["kept"].removeprefix(f"s3://{BUCKET}/")
    assert bucket.names() == {f"{kept}/model.safetensors", "exports/faq/merged/_manifest.json"}


def test_a_store_or_an_mlflow_that_does_not_answer_is_one_line_and_nothing_is_deleted(
    server: Server, bucket: Bucket, known: Known, gc: Gc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket.artifact(known.run(), "quantize-load", "four_bit", 90)
    before = bucket.names()
    with Proxy(server.port, lambda request: Fault("refuse", 403, "AccessDenied")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(InputError, match="s3:ListBucket") as caught:
            gc("--delete")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    with pytest.raises(InputError, match=r"tracking\.uri"):
        gc("--delete", "--uri", f"http://127.0.0.1:{s3.free_port()}")
    with pytest.raises(InputError, match="--older-than: '30 days': expected"):
        gc("--delete", "--older-than", "30 days")
    with pytest.raises(InputError, match="--uri"):
        gc("--delete", "--uri", "")
    assert bucket.names() == before and "\n" not in str(caught.value)
    refused_late = {"DELETE": Fault("refuse", 403, "AccessDenied")}
    with Proxy(server.port, lambda request: refused_late.get(request.method)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(InputError, match="s3:DeleteObject"):
            gc("--delete")
    assert bucket.names() == before


@pytest.mark.e2e
def test_gc_beside_a_run_and_with_a_wrong_password(
    tmp_path: Path, bucket: Bucket, gc: Gc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a real MLflow server with passwords, while a run writes its artifacts."""
    password = "a-long-enough-password"
    given = basic_auth(tmp_path, password)
    with MlflowServer(tmp_path / "server", ("--app-name", "basic-auth"), environment=given) as mlflow:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        known = Known(mlflow.uri)
        old, under_way = known.run(), known.run(status="RUNNING")
        base = bucket.artifact(old, "quantize-load", "four_bit", 90)
        stop, written = threading.Event(), list[str]()

        def write() -> None:
            while not stop.is_set():
                written.append(bucket.artifact(under_way, "train", "adapter", 0, [base]))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(3):
                gc("--delete", "--uri", mlflow.uri, "--older-than", "0m", "--unknown")
        finally:
            stop.set()
            writer.join()
        for address in (base, *written):
            assert (
                bucket.folder / address.removeprefix(f"minio://{BUCKET}/") / "weights.safetensors"
            ).exists()
        known.end(under_way)
        before = bucket.names()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD") as caught:
            gc("--delete", "--uri", mlflow.uri, "--older-than", "0m")
        assert bucket.names() == before and "\n" not in str(caught.value)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        gc("--delete", "--uri", mlflow.uri, "--older-than", "0m")
        assert bucket.names() == set()
