"""Connecting to MLflow, and its errors: a server that is away is another matter than one that refuses."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from spectraqlora.errors import InputError
from spectraqlora.settings import TrackingSettings

_AWAY = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"})
# MLflow's own retries would hold a step for four minutes before it could say that nobody answers.
_ENVIRONMENT = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class ServerAway(InputError):
    """MLflow does not answer, or answers that it cannot now."""

    def __init__(self, settings: TrackingSettings, why: str) -> None:
        super().__init__("tracking.uri", settings.uri, f"a reachable MLflow server ({why})")
        self.why = why


def connect(settings: TrackingSettings) -> Any:
    """A client of the tracking server and its registry; credentials come from MLFLOW_TRACKING_* variables."""
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with explain_errors(settings):
        return MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)


@contextlib.contextmanager
def explain_errors(settings: TrackingSettings) -> Iterator[None]:
    """Inside, MLflow's refusals become one line, and a server that does not answer `ServerAway`.

    Raises:
        InputError: the server refuses the credentials, the address that it is asked by, or the user.
        ServerAway: it does not answer, or answers that it cannot now.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        first = (str(error).splitlines() or [""])[0]
        status = error.get_http_status_code()
        if status == 401 or "error code 401" in first or error.error_code == "UNAUTHENTICATED":
            expected = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN, that it accepts"
        elif "Invalid Host header" in str(error):
            expected = "an address that the server's --allowed-hosts names"
        elif status == 403 or "error code 403" in first:
            expected = f"permission there for the user of MLFLOW_TRACKING_USERNAME ({first})"
        elif error.error_code in _AWAY:
            raise ServerAway(settings, first) from error
        else:
            raise
        raise InputError("tracking.uri", settings.uri, expected) from None
    except OSError as error:
        raise ServerAway(settings, str(error)) from error
