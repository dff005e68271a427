"""Connecting to MLflow, and its errors: a server that is away is another matter than one that refuses."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from spectraqlora.errors import InputError, NoAnswer, passing
from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.moved import follow_move

TRANSFER_SECONDS = 1800
"""How long one file may take between MLflow, and the store behind it, and us; MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT
names another time."""
_PROBE_SECONDS = 5
_TRANSFER, _TIMEOUT = "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "MLFLOW_HTTP_REQUEST_TIMEOUT"
_PAST_THE_SERVER = "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"
_ARTIFACTS = "mlflow-artifacts"
AWAY = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"})
"""MLflow's own codes of answers, and of none, that do not refuse."""
# MLflow's own retries would hold a step for four minutes before it could say that nobody answers.
_ENVIRONMENT = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    _TIMEOUT: "30",
}
_stores: dict[str, bool] = {}
"""By server: whether the store behind it answered us."""


class ServerAway(InputError):
    """MLflow does not answer, or not as it should: what it is told can wait."""

    def __init__(self, settings: TrackingSettings, why: str) -> None:
        super().__init__("tracking.uri", settings.uri, f"a reachable MLflow server ({why})")
        self.why = why


class ServerSilent(ServerAway, NoAnswer):
    """MLflow does not answer, or answers that it cannot now: another attempt may find it."""


def connect(settings: TrackingSettings) -> Any:
    """A client of the tracking server and its registry; credentials come from MLFLOW_TRACKING_* variables."""
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _refuse_empty_answers()
    follow_move(settings.uri)
    with explain_errors(settings):
        try:
            return MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)
        except Exception as error:  # A database's driver and migrations raise their own.
            if isinstance(error, OSError) or getattr(error, "error_code", None) in AWAY:
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError("tracking.uri", settings.uri, f"an address of an MLflow ({first})") from None


@functools.cache
def _refuse_empty_answers() -> None:
    """MLflow's servers answer `{}` at least; its client reads the same from an answer whose body was lost."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
    from mlflow.utils import rest_utils

    verify = rest_utils.verify_rest_response

    def verified(response: Any, endpoint: str, *given: Any, **named: Any) -> Any:
        if response.status_code == 200 and not response.content.strip():
            raise MlflowException(f"an empty answer to {endpoint}", error_code=TEMPORARILY_UNAVAILABLE)
        return verify(response, endpoint, *given, **named)

    rest_utils.verify_rest_response = verified


@contextlib.contextmanager
def explain_errors(settings: TrackingSettings) -> Iterator[None]:
    """Inside, MLflow's refusals become one line, and a server that does not answer `ServerAway`.

    Raises:
        InputError: the server refuses the credentials, the address that it is asked by, or the user.
        ServerAway: it does not answer, or answers that it cannot now.
    """
    from google.protobuf.json_format import ParseError
    from mlflow.exceptions import MlflowException, RestException

    try:
        yield
    except ParseError:
        raise InputError("tracking.uri", settings.uri, "an MLflow; what answers there is none") from None
    except MlflowException as error:
        first = (str(error).splitlines() or [""])[0]
        status = error.get_http_status_code()
        if status == 401 or "error code 401" in first or error.error_code == "UNAUTHENTICATED":
            expected = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN, that it accepts"
        elif "Invalid Host header" in str(error):
            expected = "an address that the server's --allowed-hosts names"
        elif status == 403 or "error code 403" in first:
            expected = f"permission there for the user of MLFLOW_TRACKING_USERNAME ({first})"
        elif error.error_code in AWAY:
            own = isinstance(error, RestException) and error.json.get("error_code") == "INTERNAL_ERROR"
            silent = own or error.error_code != "INTERNAL_ERROR" or passing(error)
            raise (ServerSilent if silent else ServerAway)(settings, first) from error
        else:
            raise
        raise InputError("tracking.uri", settings.uri, expected) from None
    except OSError as error:
        raise (ServerSilent if passing(error) else ServerAway)(settings, str(error)) from error


@contextlib.contextmanager
def transferring(settings: TrackingSettings) -> Iterator[None]:
    """`explain_errors`, and inside requests may take as long as a file does in a slow store.

    The server answers an upload when its store has the file, and a proxied download when it has it from there; the
    30 seconds after which any other request is given up would cut both, and each try sends the complete file again.
    """
    seconds = os.environ.get(_TRANSFER) or str(TRANSFER_SECONDS)
    with _variable(_TIMEOUT, seconds), explain_errors(settings):
        yield


@contextlib.contextmanager
def fetching(settings: TrackingSettings, location: str) -> Iterator[None]:
    """`transferring`, and inside downloads come through the server where its store does not answer us.

    MLflow hands out addresses of its store, by the name that the store has where the server is: outside of the
    cluster, or behind a network policy or a private authority, nobody answers there, which takes minutes to find out.

    Args:
        settings: the `tracking` section.
        location: MLflow's address of a file among those that are fetched.
    """
    through = location.startswith(f"{_ARTIFACTS}:") and _PAST_THE_SERVER not in os.environ
    with contextlib.ExitStack() as stack:
        stack.enter_context(transferring(settings))
        if through and not _store_answers(settings.uri, urlsplit(location).path.lstrip("/")):
            stack.enter_context(_variable(_PAST_THE_SERVER, "false"))
        yield


def _store_answers(uri: str, path: str) -> bool:
    """Whether the store answers at the address that the server hands out for a file; asked once for a server."""
    if uri not in _stores:
        _stores[uri] = _ask_store(uri, path)
    return _stores[uri]


def _ask_store(uri: str, path: str) -> bool:
    import requests
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    endpoint = f"/api/2.0/{_ARTIFACTS}/presigned/{quote(path)}"
    try:
        given = http_request(get_default_host_creds(uri), endpoint, "GET", raise_on_status=False)
    except MlflowException:
        return True  # The download will say what is wrong with the server.
    if given.status_code != 200:
        return True  # It hands out none.
    signed = given.json()
    headers = {**(signed.get("headers") or {}), "Range": "bytes=0-0"}
    try:
        with requests.get(signed["url"], headers=headers, timeout=_PROBE_SECONDS, stream=True):
            return True
    except requests.RequestException:
        return False


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Inside, an environment variable has this value; MLflow reads its own at every request."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
