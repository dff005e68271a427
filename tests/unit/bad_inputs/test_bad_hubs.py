"""Hubs that answer wrongly, slowly, without end or not at all: one line, and soon, whichever command asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants
from spectraqlora import hub, places

from tests.bad_inputs import check_refused, command
from tests.hub import Hub
from tests.wrong_server import HTML, Answer, Wrong, answer, endless, silent, trickling

JSON = "application/json"
INFO = b'{"id": "owner/name", "sha": "%s", "siblings": [], "tags": []}' % (b"a" * 40)
LINES = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ANSWERS: dict[str, Answer] = {
    "silent": silent, "a trickling head": trickling(answer("200 OK", INFO, JSON)), "a trickling body": trickling(answer("200 OK", INFO, JSON), 90),
    "an endless body": endless(LINES + b"Connection: close\r\n\r\n"), "an endless body of a length": endless(LINES + b"Content-Length: 99999999999\r\n\r\n"), "an endless head": endless(LINES),
    "a loop": b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "elsewhere": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "to a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "a page": answer("200 OK", HTML), "unavailable": answer("503 Service Unavailable", b""), "busy": answer("429 Too Many Requests", b""), "other JSON": answer("200 OK", b"[1, 2]", JSON), "no commit": answer("200 OK", b"{}", JSON), "null": answer("200 OK", b"null", JSON),
    "another commit": answer("200 OK", b'{"id": "owner/name", "sha": "../../../../etc", "siblings": []}', JSON), "cut": answer("200 OK", INFO[:30], JSON, len(INFO)), "cut within the head": LINES[:30], "deep": answer("200 OK", b"[" * 100_000, JSON), "nothing": b"", "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n", "bytes": bytes(range(256)),
}  # fmt: skip
SILENT = {
    "silent", "a trickling head", "a trickling body", "an endless head", "elsewhere", "unavailable", "busy", "cut",
    "cut within the head", "nothing", "another protocol", "bytes",
}  # fmt: skip
"""Those that another attempt may not meet: its client does not tell another protocol from a connection that breaks."""
REFUSED = ["401 Unauthorized", "403 Forbidden"]
BAD_FILES: dict[str, Answer] = {
    "silent": silent, "a trickling body": trickling(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b" " * 2000, 60),
    "an endless body": endless(b"HTTP/1.1 200 OK\r\n\r\n"), "cut": b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n{",
}  # fmt: skip
COMMANDS = {
    "plan": ["plan", "--base-model", "owner/name"], "snr": ["snr", "owner/name"], "data": ["data", "owner/name", "--base-model", "MODEL"],
    "run": ["run", "--base-model", "owner/name", "--data", "ROWS", "--workdir", "WORKDIR"], "run's data": ["run", "--base-model", "MODEL", "--data", "owner/name", "--workdir", "WORKDIR"],
}  # fmt: skip
FIELDS = r"error: (?:no answer: )?(model\.base_model|data\.source|MODEL|DATA): "
MOST_S = 20
"""Of a command here, where limits are half a second; the hub's client alone would try for longer."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The limits as they are, but for their seconds and bytes; the client tries again without waiting."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HEAD_S", "WINDOW_S"):
        monkeypatch.setattr(hub, name, 0.5)
    monkeypatch.setattr(hub, "DOCUMENT_BYTES", 8 << 20)
    monkeypatch.setattr(places, "_HUB_TIMEOUT_S", 0.5)
    waiting = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    monkeypatch.setattr("huggingface_hub.file_download.time", waiting)
    close_session()
    yield
    close_session()


def refused(
    arguments: list[str], endpoint: str, named: str, model: Path, rows: Path, tmp_path: Path, patch: pytest.MonkeyPatch,
    silent: bool = False,
) -> None:  # fmt: skip
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "ENDPOINT", endpoint)
    given = {"MODEL": model, "ROWS": rows, "WORKDIR": tmp_path / "run"}
    began = time.monotonic()
    check_refused(command(*(given.get(each, each) for each in arguments)), FIELDS + f".*{named}", silent)
    assert time.monotonic() - began < MOST_S
    assert not (tmp_path / "run").exists(), "nothing is begun before what it needs is known to be there"


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hub_that_answers_wrongly(
    name: str, kind: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Wrong(ANSWERS[kind]) as server:
        refused(
            COMMANDS[name],
            server.address,
            f"hub.*{server.address}",
            tiny_model,
            tiny_rows,
            tmp_path,
            monkeypatch,
            kind in SILENT,
        )


@pytest.mark.parametrize("status", REFUSED)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hub_that_does_not_let_one_in(
    name: str, status: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Wrong(answer(status, b"{}", JSON)) as server:
        refused(COMMANDS[name], server.address, "HF_TOKEN", tiny_model, tiny_rows, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "endpoint", ["ftp://hub", "hub", "http://", "http://127.0.0.1:9", "http://nowhere.invalid", "https://TLS"]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_address_that_is_no_hub(
    name: str,
    endpoint: str,
    tiny_model: Path,
    tiny_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Wrong(answer("200 OK", HTML)) as plain:
        endpoint = endpoint.replace("TLS", plain.address.removeprefix("http://"))
        away = endpoint.startswith("http") and endpoint != "http://"
        refused(COMMANDS[name], endpoint, "hub", tiny_model, tiny_rows, tmp_path, monkeypatch, away)


class HalfHub(Hub):
    """A hub that says what it has, and does not hand it out as it should."""

    def __init__(self, files: Answer) -> None:
        super().__init__()
        self._wrong = Wrong(files)

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        if not body or "/resolve/" not in request.path:
            return super()._answer(request, body)
        request.send_response(302)
        request.send_header("Location", self._wrong.address)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return None

    def __exit__(self, *error: object) -> None:
        self._wrong.__exit__(*error)
        super().__exit__(*error)


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("name", ["plan", "run's data"])
def test_a_hub_whose_files_never_arrive(
    name: str, kind: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(tiny_rows.read_bytes())
    with HalfHub(BAD_FILES[kind]) as server:
        server.publish("models", "owner/name", tiny_model)
        server.publish("datasets", "owner/name", folder)
        refused(
            COMMANDS[name],
            server.endpoint,
            "hub|rows",
            tiny_model,
            tiny_rows,
            tmp_path,
            monkeypatch,
            kind != "an endless body",
        )
