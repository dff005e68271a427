"""A real MLflow server for tests: its own database, stopped and started again at will."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Self

from tests.s3 import free_port

START_SECONDS = 120


def basic_auth(folder: Path, password: str) -> dict[str, str]:
    """Variables of a server started with `--app-name basic-auth`, whose user `admin` has this password."""
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\nadmin_password = {password}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only-for-this-test",
    }


class MlflowServer:
    """`mlflow server` on SQLite.

    Args:
        folder: of database, artifacts and log.
        arguments: further options of the server.
        artifacts: where it keeps artifacts; a folder beside the database unless told.
        environment: variables of the server on top of ours.
        workers: processes that serve.
    """

    def __init__(
        self,
        folder: Path,
        arguments: tuple[str, ...] = (),
        artifacts: str = "",
        environment: dict[str, str] | None = None,
        workers: int = 1,
    ) -> None:
        self.folder, self.port, self.workers = folder, free_port(), workers
        self.uri = f"http://127.0.0.1:{self.port}"
        self._arguments, self._environment = arguments, environment or {}
        self._artifacts = artifacts or str(folder / "artifacts")
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start, and wait until it answers."""
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("mlflow")), "server",
                    "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                    "--artifacts-destination", self._artifacts,
                    "--host", "127.0.0.1", "--port", str(self.port), "--workers", str(self.workers),
                    *self._arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # as the chart starts it
                    **self._environment,
                },
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                alive = self._process.poll() is None
                assert alive and time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.1)

    def stop(self) -> None:
        """End the server and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
