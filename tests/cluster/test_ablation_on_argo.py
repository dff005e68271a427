"""The ablation on Argo Workflows from the chart to a champion, trainings drained and killed on the way: all numbers are a local run's."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from mlflow import MlflowClient
from spectraqlora.artifacts import Evaluation
from spectraqlora_pipelines.cluster.argo_client import Argo

from tests.cluster.conftest import CLI, Release
from tests.cluster.runs import KILL, artifact, ended, inside, resumed, submit, training_at
from tests.cluster.services import Store
from tests.unit.steps.train.test_checkpoints import same

pytestmark = [pytest.mark.cluster, pytest.mark.core]
STEPS, EVERY = 100, 20
SETTINGS = (
    *("--set", "methods=qlora,hybrid", "--set", f"train.max_steps={STEPS}", "--set", "train.evaluations=2"),
    *("--set", "evaluate.accuracy_rows=8", "--set", "checkpoint.every_minutes=0"),
    *("--set", f"checkpoint.every_steps={EVERY}"),
)
LOOK = """
import json, os, pathlib
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
try:
    pathlib.Path("/opt/probe").write_text("")
    root = "writable"
except OSError as error:
    root = os.strerror(error.errno)
told = {key: status[key].strip() for key in ("CapEff", "CapPrm", "CapBnd", "Seccomp", "NoNewPrivs")}
print(json.dumps({**told, "uid": os.getuid(), "gid": os.getgid(), "root": root,
                  "account": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount/token")}))
"""


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    """All that an evaluation says but for times and memory, and where its base and checkpoints are."""
    told = evaluation.model_dump()

    def without(part: Any) -> Any:
        if isinstance(part, dict):
            return {
                key: without(value) for key, value in part.items()
                if not re.search("second|memory|image", key)
            }  # fmt: skip
        return [without(value) for value in part] if isinstance(part, list) else part

    return dict(without(told))


def test_of_two_trainings_one_is_drained_and_one_killed_and_the_run_ends_with_a_local_runs_numbers_and_a_champion(
    argo: Argo, release: Release, store: Store, sample: None, tmp_path: Path
) -> None:
    environment = {**os.environ, **store.variables, "OMP_NUM_THREADS": "1"}
    submit(argo, release, *SETTINGS)

    settings = yaml.safe_load(release.settings.read_text())
    for section in ("tracking", "checkpoint"):
        del settings[section]
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(settings))
    own = tmp_path / "local"
    local = subprocess.Popen(
        [*CLI, "run", "--config", str(tmp_path / "local.yaml"), "--workdir", str(own), *SETTINGS[:-4]],
        env=environment, stdout=open(tmp_path / "local.log", "w"), stderr=subprocess.STDOUT,  # noqa: SIM115
    )  # fmt: skip
    try:
        sandbox = yaml.safe_load(inside(argo.namespace, training_at(argo, "qlora", 1, of=STEPS), LOOK))
        drained, seen_step = training_at(argo, "qlora", EVERY + 5, of=STEPS), EVERY + 5
        told = time.monotonic()
        client.CoreV1Api().delete_namespaced_pod(drained.metadata.name, argo.namespace)
        lost = training_at(argo, "hybrid", EVERY + 5, of=STEPS)
        killed = time.monotonic()
        inside(argo.namespace, lost, KILL)
        last = resumed(argo, "qlora", drained, told)
        assert last >= seen_step, "it wrote a checkpoint when it was told to end"
        assert resumed(argo, "hybrid", lost, killed) % EVERY == 0, (
            "it was not told, and goes on from the last one"
        )
        state, _ = ended(argo, 600)
        assert local.wait(600) == 0, (tmp_path / "local.log").read_text()
    finally:
        local.kill()
        local.wait()

    nothing = "0000000000000000"
    assert sandbox == {
        "uid": 10001, "gid": 0, "root": "Read-only file system", "NoNewPrivs": "1", "Seccomp": "2",
        "CapEff": nothing, "CapPrm": nothing, "CapBnd": nothing, "account": False,
    }, sandbox  # fmt: skip
    assert state == "SUCCEEDED"
    for method in ("qlora", "hybrid"):
        (adapter,) = own.glob(f"artifacts/train-{method}-*/adapter")
        same(artifact(argo, store, f"train-{method}", "adapter", tmp_path), adapter)
        (evaluation,) = own.glob(f"artifacts/re-evaluate-{method}-*/evaluation")
        there = Evaluation.read(artifact(argo, store, f"re-evaluate-{method}", "evaluation", tmp_path))
        assert numbers(there) == numbers(Evaluation.read(evaluation))
    champions = [
        MlflowClient(uri).get_model_version_by_alias("spectraqlora", "champion")
        for uri in (release.mlflow, f"sqlite:///{own}/mlflow.db")
    ]
    assert champions[0].tags["method"] == champions[1].tags["method"]
