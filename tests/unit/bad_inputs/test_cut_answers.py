"""Answers that a broken connection cut, or that say nothing: an outage in one line, never an empty list."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from spectraqlora.settings import TrackingSettings
from spectraqlora.storage import Connection, list_files, list_objects, parse_address
from spectraqlora.tracking.registry import Registry
from spectraqlora.tracking.server import ServerAway, explain_errors
from spectraqlora_pipelines.cli.kubeflow import connect
from spectraqlora_pipelines.cluster.argo_client import Argo
from spectraqlora_pipelines.cluster.kube import NoAccess
from spectraqlora_pipelines.cluster.pods import Pods

from tests.bad_inputs import check_refused
from tests.s3 import environment
from tests.wrong_server import Wrong

HEAD = (
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nServer: uvicorn\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\n\r\n"
)
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
CUTS = [17, 39, 59, 85, 92, 100, len(HEAD) - 2]
"""After the status, within a name and a value, and before the length and the empty line."""
CUT = [*(HEAD[:cut] for cut in CUTS), HEAD + b"{", UNTIL_CLOSED, UNTIL_CLOSED + b'{"a": [']
ID = "12345678-1234-1234-1234-123456789012"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    import kfp.client.client

    monkeypatch.setattr(kfp.client.client, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")


@pytest.fixture
def server() -> Iterator[Wrong]:
    with Wrong(HEAD + b"{}") as server:
        yield server
        server.shutdown()


@pytest.mark.parametrize("content", CUT)
def test_an_mlflow_whose_answer_is_cut_is_away(server: Wrong, content: bytes) -> None:
    registry = Registry(TrackingSettings(uri=server.address))
    assert registry.versions() == []
    server.content = content
    with pytest.raises(ServerAway):
        registry.versions()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionError("Connection refused"), 75),
        (MlflowException("API request failed with error code 503 != 200"), 75),
        (MlflowException("API request failed with error code 429 != 200"), 75),
        (MlflowException("API request failed with error code 407 != 200"), 2),
        (MlflowException("Detected out-of-date database schema (found version a, but expected b)"), 2),
        (MlflowException("SSLError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), 2),
        (OSError("Could not find a suitable TLS CA certificate bundle, invalid path: /x"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2),
    ],
)
def test_what_another_attempt_at_an_mlflow_meets_again_is_not_tried_again(
    error: Exception, code: int
) -> None:
    with pytest.raises(ServerAway) as ended, explain_errors(TrackingSettings(uri="http://mlflow")):
        raise error
    assert ended.value.exit_code == code


@pytest.mark.parametrize(
    "content",
    [
        *CUT,
        UNTIL_CLOSED + b'"a"',
        UNTIL_CLOSED + b'{"recurringRuns": 5}',
        UNTIL_CLOSED + b"[" * 100_000,
    ],
)
def test_a_kubeflow_whose_answer_is_cut_has_not_said_that_there_is_nothing(
    server: Wrong, content: bytes
) -> None:
    kubeflow = connect(server.address, "", "", "")
    assert kubeflow.schedules() == []
    server.content = content
    # Only where its length says that more was to come is it known to be cut; else it may be no KFP's.
    cut = b"Content-Length: 2" in content
    check_refused(kubeflow.schedules, "--host", cut)
    check_refused(lambda: kubeflow.run(ID), "--host", cut)


def test_a_run_without_its_id_is_none(server: Wrong) -> None:
    check_refused(lambda: connect(server.address, "", "", "").run(ID), "--host")


@pytest.mark.parametrize(
    "content",
    [b'{"registered_models": 5}', b'{"registered_models": [5]}', b'{"registered_models": [{"name": []}]}'],
)
def test_an_mlflow_whose_answer_has_another_shape(server: Wrong, content: bytes) -> None:
    server.content = UNTIL_CLOSED + content
    check_refused(lambda: Registry(TrackingSettings(uri=server.address)).versions(), "tracking.uri")


@pytest.mark.parametrize("content", [*(HEAD[:cut] for cut in CUTS), UNTIL_CLOSED])
def test_a_store_whose_answer_is_cut_holds_not_nothing(
    server: Wrong, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(server.address).items():
        monkeypatch.setenv(name, value)
    server.content = content
    address = parse_address("s3://bucket/model")
    # Of a manifest without its body it is not known whether it was cut, or whether a store sent it.
    unknown = b"Content-Length: 2" in content
    for ask in (list_files, list_objects):
        silent = ask is list_objects or not unknown
        check_refused(
            lambda ask=ask: ask(address, Connection(patience_s=0.1)), "can be reached|is none", silent
        )


@pytest.mark.parametrize("content", CUT)
def test_a_kubernetes_whose_answer_is_cut_has_not_said_that_there_is_nothing(
    server: Wrong, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": server.address}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }  # fmt: skip
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    server.content = content
    for ask in (Argo("argo").schedules, lambda: Pods("argo").workflow(ID), lambda: Pods("argo").of(ID)):
        with pytest.raises(NoAccess):
            ask()
