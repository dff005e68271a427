"""Servers that answer every request alike, whatever that is: wrong bytes, none, too many, or one at a time."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

HTML = b"<html><body>Sign in</body></html>"
Answer = bytes | Callable[[threading.Event], Iterable[bytes]]
"""What is sent; a function gets an event that is set when the server closes, and yields."""


def answer(status: str, body: bytes, kind: str = "text/html", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode()
        + body
    )


def silent(closing: threading.Event) -> Iterator[bytes]:
    """Nothing, for as long as the server is there."""
    closing.wait()
    yield b""


def trickling(content: bytes, at_once: int = 0) -> Answer:
    """So many bytes, and the others ten in a second."""

    def send(closing: threading.Event) -> Iterator[bytes]:
        yield content[:at_once]
        for byte in content[at_once:]:
            if closing.wait(0.1):
                return
            yield bytes([byte])

    return send


def endless(head: bytes) -> Answer:
    """A head, and a body as fast as it is taken, for ever."""

    def send(closing: threading.Event) -> Iterator[bytes]:
        yield head
        while not closing.is_set():
            yield b" " * (1 << 20)

    return send


class Wrong(socketserver.ThreadingTCPServer):
    """A server that answers every request with `content`."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, content: Answer) -> None:
        self.content = content
        self.closing = threading.Event()
        wrong = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    self.request.settimeout(5)
                    self.request.recv(1 << 16)
                    given = wrong.content
                    for part in [given] if isinstance(given, bytes) else given(wrong.closing):
                        self.request.sendall(part)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __exit__(self, *error: Any) -> None:
        self.closing.set()
        self.shutdown()
        super().__exit__(*error)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"
