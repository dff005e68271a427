"""The ablation on Argo Workflows from the chart to a champion, with a training's pods deleted on the way: all numbers are a local run's."""

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
from kubernetes.stream import stream
from mlflow import MlflowClient
from spectraqlora.artifacts import Evaluation
from spectraqlora_pipelines.cluster.argo_client import Argo

from tests.cluster.conftest import CLI, Release
from tests.cluster.runs import artifact, ended, resumed, submit, training_at
from tests.cluster.services import Store
from tests.unit.steps.train.test_checkpoints import same

pytestmark = pytest.mark.cluster
STEPS, EVERY = 100, 20
SETTINGS = (
    *("--set", "methods=qlora,hybrid", "--set", f"train.max_steps={STEPS}", "--set", "train.evaluations=2"),
    *("--set", "evaluate.accuracy_rows=8", "--set", f"checkpoint.every_steps={EVERY}"),
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


def inside(namespace: str, pod: Any, code: str) -> dict[str, Any]:
    """What Python code prints in a step's container, as YAML."""
    command = ["python3", "-c", code]
    said = stream(
        client.CoreV1Api().connect_get_namespaced_pod_exec, pod.metadata.name, namespace,
        container="main", command=command, stdout=True, stderr=True, stdin=False, tty=False,
        _preload_content=True,
    )  # fmt: skip
    return dict(yaml.safe_load(said))


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


def test_two_trainings_lose_their_pods_and_the_run_ends_with_a_local_runs_numbers_and_a_champion(
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
        [*CLI, "run", "--config", str(tmp_path / "local.yaml"), "--workdir", str(own), *SETTINGS[:-2]],
        env=environment, stdout=open(tmp_path / "local.log", "w"), stderr=subprocess.STDOUT,  # noqa: SIM115
    )  # fmt: skip
    try:
        core = client.CoreV1Api()
        sandbox = inside(argo.namespace, training_at(argo, "qlora", 1, of=STEPS), LOOK)
        drained, seen_step = training_at(argo, "qlora", EVERY + 5, of=STEPS), EVERY + 5
        told = time.monotonic()
        core.delete_namespaced_pod(drained.metadata.name, argo.namespace)
        lost = training_at(argo, "hybrid", EVERY + 5, of=STEPS)
        killed = time.monotonic()
        core.delete_namespaced_pod(lost.metadata.name, argo.namespace, grace_period_seconds=0)
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
