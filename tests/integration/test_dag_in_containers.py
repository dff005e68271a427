"""The compiled DAG in its real images, with a real S3 server and a real MLflow server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3  # type: ignore[import-untyped]
import pytest
from spectraqlora.files import folder_digest
from spectraqlora.runtime.images import IMAGE_USER

from tests.containers import engine
from tests.integration.test_dag import CLI, METHODS
from tests.mlflow_server import MlflowServer
from tests.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, Server, environment

pytestmark = pytest.mark.e2e
STEPS = 40


class Finished(NamedTuple):
    """A run through all branches, its servers still up."""

    workdir: Path
    s3: Any
    tracking: str
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    engine()
    from spectraqlora.sample.make import ensure_sample

    folder, sample = tmp_path_factory.mktemp("containers"), ensure_sample()
    with Server(folder / "s3") as store:
        variables = environment(store.endpoint)
        store.put_plain(sample / "model", "base")
        client = boto3.client(
            "s3", endpoint_url=store.endpoint, aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY, region_name="us-east-1",
        )  # fmt: skip
        client.upload_file(str(sample / "data.jsonl"), BUCKET, "data/rows.jsonl")
        with MlflowServer(
            folder / "mlflow", artifacts=f"s3://{BUCKET}/mlflow", environment=variables
        ) as server:
            arguments = [
                "run", "--runner", "docker", "--workdir", str(folder / "work"), "--max-steps", str(STEPS),
                "--base-model", f"s3://{BUCKET}/base", "--data", f"s3://{BUCKET}/data/rows.jsonl",
                "--set", f"checkpoint.destination=s3://{BUCKET}/checkpoints", "--set", "checkpoint.every_steps=20",
                "--set", f"export.destination=s3://{BUCKET}/export",
                "--set", f"tracking.uri={server.uri}", "--set", "evaluate.accuracy_rows=16",
            ]  # fmt: skip
            done = subprocess.run(
                [*CLI, *arguments], capture_output=True, text=True, check=False, timeout=1500,
                env={**os.environ, **variables},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            yield Finished(folder / "work", client, server.uri, done.stdout + done.stderr)


def keys(finished: Finished, prefix: str) -> list[str]:
    pages = finished.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def test_every_branch_learned_and_the_export_scores_as_its_adapter(finished: Finished) -> None:
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert summary["methods"].keys() == set(METHODS)
    base = summary["base"]["eval_loss"]
    for name, entry in summary["methods"].items():
        assert entry["eval_loss"] < 0.8 * base, name
    assert summary["merged_eval_loss"] < 0.8 * base
    assert summary["base"]["model"] == f"s3://{BUCKET}/base"
    assert (finished.workdir / "report.html").stat().st_size > 20_000


def test_every_step_ran_in_its_own_image(finished: Finished) -> None:
    log = (finished.workdir / "run.log").read_text()
    assert log.count("finished with status SUCCESS") >= 6 + 3 * len(METHODS)
    assert "Traceback" not in log


def test_checkpoints_and_export_are_in_the_store(finished: Finished) -> None:
    assert any(key.endswith(".safetensors") for key in keys(finished, "checkpoints/"))
    exported = keys(finished, "export/")
    for name in ("merged", "adapter"):
        assert any(f"/{name}/" in key and key.endswith(".safetensors") for key in exported), exported


def test_runs_and_the_registered_model_are_in_the_mlflow_server(finished: Finished, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(finished.tracking, finished.tracking)
    experiment = client.get_experiment_by_name("spectraqlora")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["spectraqlora.branch"] for run in runs} == {"pipeline", *METHODS}
    assert {run.info.status for run in runs} == {"FINISHED"}
    version = client.get_model_version_by_alias("spectraqlora", "challenger")
    assert version.tags["merged_digest"] == folder_digest(finished.workdir / "merged")
    assert any(key.endswith(".safetensors") for key in keys(finished, "mlflow/"))
    # In a process of its own: MLflow keeps the server that other tests of this one named.
    script = "import sys; from mlflow.artifacts import download_artifacts; download_artifacts(sys.argv[1], dst_path=sys.argv[2])"
    subprocess.run(
        [sys.executable, "-c", script, f"models:/spectraqlora/{version.version}", str(tmp_path)],
        check=True, env={**os.environ, "MLFLOW_TRACKING_URI": finished.tracking},
    )  # fmt: skip
    assert list(tmp_path.rglob("MLmodel"))


def test_no_secret_is_left_on_disk_or_screen(finished: Finished) -> None:
    assert SECRET_KEY not in finished.printed
    for path in finished.workdir.rglob("*"):
        if path.is_file():
            assert SECRET_KEY.encode() not in path.read_bytes(), path


def test_what_steps_left_belongs_to_their_user(finished: Finished) -> None:
    written = [path for path in (finished.workdir / "artifacts").rglob("four_bit/model/*")]
    assert written and {path.stat().st_uid for path in written} == {os.getuid() or IMAGE_USER}
