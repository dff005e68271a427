"""Servers that several tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mlflow_server import MlflowServer


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A tracking server with two workers, so that requests really meet in the database."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), workers=2) as server:
        yield server
