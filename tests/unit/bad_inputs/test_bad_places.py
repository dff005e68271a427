"""Outputs that cannot be written, and servers that answer wrongly or not at all: one line, and soon."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from spectraqlora.settings import Settings, TrackingSettings
from spectraqlora.storage import Connection, content_digest, parse_address
from spectraqlora.tracking.registry import Registry
from spectraqlora_pipelines.cli.kubeflow import connect
from spectraqlora_pipelines.local.preflight import claim_workdir

from tests.bad_inputs import check_refused, command, written
from tests.s3 import environment
from tests.wrong_server import HTML, Wrong, answer

WORKDIRS: list[tuple[str, str]] = [
    ("/proc/run", "--workdir"), ("/proc/1/run", "--workdir"), ("/sys/run", "--workdir"), ("/dev/null", "--workdir"), ("/dev/null/run", "--workdir"), ("FILE", "--workdir"), ("FILE/run", "--workdir"), ("FILE/a/b", "--workdir"), ("FOREIGN", "--workdir"), ("LOOP", "--workdir"), ("LOOP/run", "--workdir"),
    ("GARBAGE", "run.json"), ("LIST", "--workdir"), ("EMPTY", "--workdir"), ("DEEP", "run.json"), ("BYTES", "run.json"), ("FOLDER", "run.json"), ("x" * 300, "folder"), ("/" + "x/" * 3000, "folder"), ("DANGLING/run", "--workdir"), ("OTHER", "--workdir"),
]  # fmt: skip
RUNS: dict[str, str | bytes] = {
    "GARBAGE": "no JSON", "LIST": "[1]", "EMPTY": "{}", "DEEP": "[" * 100_000 + "]" * 100_000, "BYTES": b"\xff\xfe", "OTHER": '{"settings": "x", "artifacts": 0}'
}  # fmt: skip
FILES = ["/proc/x", "/dev/null/x", "/sys/x", "FILE/x", "FOLDER", "x" * 300 + ".yaml"]


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], str]:
    """A path by its name in the tables."""
    written(tmp_path / "FILE", "x")
    written(tmp_path / "FOREIGN" / "notes.txt", "mine")
    (tmp_path / "LOOP").symlink_to(tmp_path / "LOOP")
    (tmp_path / "DANGLING").symlink_to("/proc/none")
    (tmp_path / "FOLDER" / "run.json").mkdir(parents=True)
    for name, content in RUNS.items():
        written(tmp_path / name / "run.json", content)
    return lambda name: name if name.startswith("/") else str(tmp_path / name)


@pytest.mark.parametrize(("name", "named"), WORKDIRS, ids=range(len(WORKDIRS)))
def test_a_work_directory_that_cannot_be_one(name: str, named: str, place: Callable[[str], str]) -> None:
    check_refused(lambda: claim_workdir(Path(place(name)), Settings(), {}), named)


@pytest.mark.parametrize("name", FILES, ids=range(len(FILES)))
@pytest.mark.parametrize("arguments", [["compile", "--output"], ["sample"]], ids=" ".join)
def test_an_output_that_cannot_be_written(
    arguments: list[str], name: str, place: Callable[[str], str]
) -> None:
    if arguments == ["sample"] and name == "FOLDER":
        name = "FILE"
    check_refused(command(*arguments, place(name)), "--output|FOLDER|folder")


# --- servers -------------------------------------------------------------------------------------------------

ANSWERS: dict[str, bytes] = {
    "a page": answer("200 OK", HTML), "a page of errors": answer("500 Internal Server Error", HTML), "unavailable": answer("503 Service Unavailable", b""), "no gateway": answer("502 Bad Gateway", HTML), "forbidden": answer("403 Forbidden", HTML), "unknown user": answer("401 Unauthorized", b"{}", "application/json"), "not found": answer("404 Not Found", b"no"),
    "half an answer": answer("200 OK", b'{"a', "application/json", 5000), "other JSON": answer("200 OK", b"[1, 2]", "application/json"), "no JSON": answer("200 OK", b"{", "application/json"), "null": answer("200 OK", b"null", "application/json"), "nothing": b"", "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n", "bytes": bytes(range(256)),
    "a loop": b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "elsewhere": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
}  # fmt: skip


AWAY = {"a page of errors", "unavailable", "no gateway", "half an answer", "nothing", "elsewhere"}
"""Those that another attempt may not meet."""
AWAY_OF = {
    "mlflow": AWAY,
    # Of a server that answers any of these KFP's client says only how often it has asked.
    "kubeflow": AWAY | {"forbidden", "unknown user", "not found"},
    # Its client does not tell another protocol from a connection that breaks.
    "store": {"a page of errors", "unavailable", "no gateway", "nothing", "another protocol", "bytes"},
}


@pytest.fixture(params=ANSWERS, ids=str)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wrong(kind: str) -> Iterator[str]:
    with Wrong(ANSWERS[kind]) as server:
        yield server.address
        server.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients of MLflow and KFP without the seconds between their tries."""
    import kfp.client.client

    monkeypatch.setattr(kfp.client.client, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")


def versions(uri: str) -> object:
    return Registry(TrackingSettings(uri=uri)).versions()


def test_an_mlflow_that_answers_wrongly(kind: str, wrong: str) -> None:
    check_refused(lambda: versions(wrong), "tracking.uri", kind in AWAY_OF["mlflow"])


def test_a_kubeflow_that_answers_wrongly(kind: str, wrong: str) -> None:
    check_refused(lambda: connect(wrong, "", "", "").run("x"), "--host|RUN", kind in AWAY_OF["kubeflow"])


def test_a_store_that_answers_wrongly(kind: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(wrong).items():
        monkeypatch.setenv(name, value)
    address = parse_address("s3://bucket/model")
    check_refused(lambda: content_digest(address, Connection(patience_s=0.1)), "s3", kind in AWAY_OF["store"])


DATABASES: dict[str, bytes] = {
    "text": b"this is not a database at all, sorry",
    "cut": b"SQLite format 3\0" + bytes(40),
    "bytes": bytes(range(256)) * 20,
}
NOBODY = ["http://127.0.0.1:9", "https://127.0.0.1:9", "http://nowhere.invalid", "http://", "nope", "ftp://h"]
"""Where no server is, and names that are no host's: MLflow and KFP take the last three for names."""
URIS = [
    "http://127.0.0.1:9", "https://127.0.0.1:9", "http://nowhere.invalid", "ftp://host", "nope://host", "http://", "http://[::1", "http://127.0.0.1:99999", "sqlite:////proc/none/mlflow.db", "sqlite:////dev/null/mlflow.db", "s3://bucket/mlflow", "http:/host", "mysql://nowhere", "uc:nope", "://",
]  # fmt: skip


@pytest.mark.parametrize("uri", URIS)
def test_an_address_that_is_no_mlflow(uri: str) -> None:
    check_refused(lambda: versions(uri), "tracking.uri", uri in NOBODY)


@pytest.mark.parametrize("kind", DATABASES)
def test_a_database_that_is_none(kind: str, tmp_path: Path) -> None:
    written(tmp_path / "mlflow.db", DATABASES[kind])
    check_refused(command("models", "--uri", tmp_path), "tracking.uri|--uri")


def test_a_database_of_something_else(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values ('nope')")
        database.commit()
    check_refused(command("models", "--uri", tmp_path), "tracking.uri|--uri")


HOSTS = [
    "",
    "nope",
    "ftp://h",
    "http://",
    "http://127.0.0.1:9",
    "http://nowhere.invalid",
    "http://127.0.0.1:99999",
    "https://127.0.0.1:9",
    "http://u:p@h",
    "http://h/?token=x",
]


@pytest.mark.parametrize("host", HOSTS)
def test_an_address_that_is_no_kubeflow(host: str) -> None:
    check_refused(lambda: connect(host, "", "", ""), "--host", host in NOBODY and host != "http://")


def test_servers_whose_certificate_nobody_knows_or_that_speak_no_tls() -> None:
    with Wrong(answer("200 OK", HTML)) as plain:
        secure = plain.address.replace("http://", "https://")
        check_refused(lambda: versions(secure), "tracking.uri")
        check_refused(lambda: connect(secure, "", "", ""), "--host")
        plain.shutdown()
