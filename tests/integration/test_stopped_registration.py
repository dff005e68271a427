"""A register step that is stopped at any of its requests: its retry leaves one complete version with its alias."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.errors import InputError
from spectraqlora.settings import TrackingSettings
from spectraqlora.steps.detect_changes.changes import SOURCE_DIGEST
from spectraqlora.steps.register.register import Inputs, register
from spectraqlora.tracking.registered_model import download_model, load_model
from spectraqlora.tracking.registry import ADAPTER, CHALLENGER, COMPLETING_TAG, HELD_OUT, Registry, Version
from spectraqlora.tracking.runs import Tracker

from tests.mlflow_server import MlflowServer
from tests.stopped import run_until_request

pytestmark = pytest.mark.e2e
ORIGIN = {SOURCE_DIGEST: "source", "recipe_digest": "recipe"}


def _settings(folder: Path) -> TrackingSettings:
    return TrackingSettings(uri=f"sqlite:///{folder}/mlflow.db", registered_model="stopped")


def _register(folder: Path, inputs: Inputs, key: str = "run-1") -> int:
    return register(Tracker(_settings(folder), key, "register"), inputs, ORIGIN)[1]


def _everything(folder: Path) -> list[Version]:
    return Registry(_settings(folder))._all()


def _logged(registry: Registry, run_id: str) -> list[Any]:
    experiment = registry.client.get_run(run_id).info.experiment_id
    return list(registry.client.search_logged_models([experiment]))


@pytest.fixture(scope="module")
def inputs(exported: Path, prepared: Path) -> Inputs:
    return Inputs(rows=prepared, winner=exported, exported=exported)


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The version of a step that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _register(folder, inputs)
    (version,) = _everything(folder)
    assert version.complete and version.aliases == (CHALLENGER,)
    assert version.tags.keys() >= {"method", "merged_digest", "eval_digest", "tokenizer_digest", *ORIGIN}
    assert version.metrics[COMPLETING_TAG] == 1.0
    return version


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    assert run_until_request(lambda: Registry(_settings(folder)))
    return folder / "mlflow.db"


def test_a_stop_at_any_request_and_a_retry_leave_one_complete_version(
    inputs: Inputs, undisturbed: Version, empty_database: Path, tmp_path: Path
) -> None:
    request, finished, without, with_one = 0, False, 0, 0
    while not finished:
        request += 1
        folder = tmp_path / str(request)
        folder.mkdir()
        shutil.copy(empty_database, folder)
        finished = run_until_request(lambda folder=folder: _register(folder, inputs), request)  # type: ignore[misc]
        registry = Registry(_settings(folder))
        left = registry.versions()
        assert [version.tags for version in left] in ([], [undisturbed.tags]), (
            "readers see all of it or nothing"
        )
        without, with_one = without + (not left), with_one + len(left)
        if not finished:
            assert run_until_request(lambda folder=folder: _register(folder, inputs))  # type: ignore[misc]
        (version,) = _everything(folder)
        assert version.complete and version.aliases == (CHALLENGER,), request
        assert version.tags == undisturbed.tags and version.metrics == undisturbed.metrics, request
        (model,) = _logged(registry, version.run_id)
        assert model.status == "READY", request
        for name, file in ((HELD_OUT, "rows.parquet"), (ADAPTER, "adapter_model.safetensors")):
            assert (registry.download(version, name, folder) / file).exists()
        assert (download_model(registry.settings, version, folder) / "MLmodel").exists()
    print(f"a registration stopped at each of its {request - 1} requests")
    assert without > 10 and with_one > 2, "it was stopped before the version was there, and after"
    load_model(download_model(registry.settings, version, tmp_path))


def test_a_half_tagged_version_is_nobodys_candidate_until_its_own_retry_completes_it(
    inputs: Inputs, undisturbed: Version, tmp_path: Path
) -> None:
    number = _register(tmp_path, inputs)
    registry = Registry(_settings(tmp_path))
    for tag in (COMPLETING_TAG, SOURCE_DIGEST, "method"):
        registry.client.delete_model_version_tag(registry.name, str(number), tag)
    registry.client.delete_registered_model_alias(registry.name, CHALLENGER)
    assert registry.versions() == []
    with pytest.raises(InputError, match="'1': expected a complete version; the register step of run run-1"):
        registry.version(number)
    other = _register(tmp_path, inputs, "run-2")
    assert [version.number for version in registry.versions()] == [other]
    assert _register(tmp_path, inputs) == number
    completed, newer = registry.version(number), registry.version(other)
    assert completed.tags == undisturbed.tags
    assert newer.aliases == (CHALLENGER,) and completed.aliases == (), "the newer one stays the challenger"


def test_a_server_registers_a_model_once_however_often_it_is_asked(
    inputs: Inputs, undisturbed: Version, tmp_path: Path
) -> None:
    with MlflowServer(tmp_path) as server:
        settings = TrackingSettings(uri=server.uri, registered_model="once")
        numbers = [register(Tracker(settings, "run-1", "register"), inputs, ORIGIN)[1] for _ in range(2)]
        registry = Registry(settings)
        (version,) = registry.versions()
        assert numbers == [version.number] * 2
        assert version.tags == undisturbed.tags and version.aliases == (CHALLENGER,)
        assert len(_logged(registry, version.run_id)) == 1
