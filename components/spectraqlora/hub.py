"""The model hub's client, with limits: a server that says nothing, trickles or never ends is given up within a minute.

`huggingface_hub` limits the seconds between two bytes of some requests, and of others nothing; after a limit it tries
again, with longer ones. HF_HUB_DOWNLOAD_TIMEOUT, in seconds, raises the limits where a proxy or a line is slow.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2  # huggingface_hub's HTTP library
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
)
from huggingface_hub.utils._http import default_client_factory

from spectraqlora.errors import InputError, NoAnswer, busy

HEAD_S = 20.0
"""Until an answer's head is there, redirects included."""
WINDOW_S, WINDOW_BYTES = 20.0, 10_000
"""So much of a body has to come in so many seconds."""
DOCUMENT_BYTES = 64 << 20
"""The most that is read of an answer that is no file, or does not say how long it is."""
COMMIT = re.compile(r"[0-9a-f]{40}")
_USUAL = "https://huggingface.co"


class _TooLong(Exception):
    """An answer of more bytes than any that is meant."""


class _GivenUp(Exception):
    """An answer over the limits of time. Not one of the HTTP library's own faults, after which the hub's client tries again."""


def _seconds(limit: float) -> float:
    return limit * max(1.0, constants.HF_HUB_DOWNLOAD_TIMEOUT / constants.DEFAULT_DOWNLOAD_TIMEOUT)


class _Bounded(httpx2.SyncByteStream):
    """A body that is read as long as it keeps its pace and its length."""

    def __init__(self, body: Any, most: int | None) -> None:
        self._body, self._most = body, most

    def __iter__(self) -> Iterator[bytes]:
        body, length = iter(self._body), 0
        waited, arrived = 0.0, 0
        while True:
            # What the reader does with a chunk is none of the server's time.
            began = time.monotonic()
            chunk = next(body, None)
            if chunk is None:
                return
            waited, arrived, length = (
                waited + time.monotonic() - began,
                arrived + len(chunk),
                length + len(chunk),
            )
            if self._most is not None and length > self._most:
                raise _TooLong(f"an answer of more than {self._most >> 20} MiB")
            if waited > _seconds(WINDOW_S):
                if arrived < WINDOW_BYTES:
                    raise _GivenUp(f"{arrived} bytes in {waited:.0f} seconds")
                waited, arrived = 0.0, 0
            yield chunk

    def close(self) -> None:
        self._body.close()


def _bound(response: httpx2.Response) -> None:
    document = response.request.url.path.startswith("/api/") or "Content-Length" not in response.headers
    response.stream = _Bounded(response.stream, DOCUMENT_BYTES if document else None)


def _in_time(send: Callable[..., Any], request: httpx2.Request, **given: Any) -> Any:
    """What a client's `send` returns, if it does in time: a head that trickles keeps to every limit between two bytes."""
    ended: list[Any] = []

    def work() -> None:
        try:
            ended.append(send(request, **{**given, "stream": True}))
        except Exception as error:
            ended.append(error)

    # Left alone where it takes too long: nothing ends a read from outside.
    worker = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    worker.start()
    worker.join(_seconds(HEAD_S))
    if not ended:
        raise _GivenUp(f"no answer in {_seconds(HEAD_S):.0f} seconds")
    if isinstance(ended[0], Exception):
        raise ended[0]
    response = ended[0]
    if not given.get("stream"):
        try:
            response.read()
        except BaseException:
            response.close()
            raise
    return response


def _client() -> Any:
    client: Any = default_client_factory()
    client.timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    client.event_hooks = {**client.event_hooks, "response": [_bound]}
    client.send = functools.partial(_in_time, client.send)
    return client


@functools.cache
def limit_requests() -> None:
    """From here on every request to the hub has its limits, those of transformers too."""
    # One more question to the hub, whose answer, whatever it is, it keeps for a day and fails on.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    set_client_factory(_client)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Inside, what is fetched shows no bars: small files, of which a line says what is wrong with them."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def explained(expected: str, error: BaseException) -> str:
    """What is expected of the hub, and how it failed: for the line that a fault of its client becomes."""
    at = "" if constants.ENDPOINT == _USUAL else f" at {constants.ENDPOINT} (HF_ENDPOINT)"
    cause: BaseException | None = error
    while cause is not None:
        if getattr(getattr(cause, "response", None), "status_code", 0) in (401, 403):
            return f"{expected}{at} that you, or HF_TOKEN, may read"
        cause = cause.__cause__
    if isinstance(error, (AttributeError, LookupError, TypeError, RecursionError)):
        return f"{expected}{at} (what answers is no hub)"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{expected}{at} ({lines[0].strip()})"


_LASTING = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.ProxyError)
"""Faults of the client's own making, or of a proxy that refuses."""


def silent(error: BaseException | None) -> bool:
    """Whether the hub, or the way to it, failed in a manner that another attempt may not meet."""
    while error is not None:
        if isinstance(error, _LASTING) or "CERTIFICATE" in str(error):
            return False
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if busy(status) or isinstance(error, (httpx2.TransportError, _GivenUp, EOFError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def refusal(field: str, value: object, expected: str, error: Exception) -> InputError:
    """The line that a fault of the hub's client becomes: `NoAnswer` where another attempt may not meet it."""
    kind = NoAnswer if silent(error) else InputError
    return kind(field, value, explained(expected, error))


class HubFile:
    """A file on the hub, read in parts.

    Args:
        url: of the file.
        size: in bytes.
        fault: the line that a fault becomes.
    """

    def __init__(self, url: str, size: int, fault: Callable[[Exception], InputError]) -> None:
        limit_requests()
        self._url, self.size, self._fault = url, size, fault

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes from an offset.

        Raises:
            InputError: a hub that refuses, or does not answer, or answers with fewer bytes.
        """
        content = bytearray()
        if not length:
            return content
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            with get_session().stream("GET", self._url, headers=headers, follow_redirects=True) as response:
                hf_raise_for_status(response)
                # 206: a part, as asked for. A server that knows no ranges answers with all of the file.
                skipped = 0 if response.status_code == 206 else offset
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) >= skipped + length:
                        break
        except Exception as error:  # The hub's client lets those of its HTTP library through.
            raise self._fault(error) from None
        if len(content) < skipped + length:
            raise self._fault(EOFError(f"{len(content)} bytes instead of {skipped + length}"))
        return content[skipped : skipped + length]
