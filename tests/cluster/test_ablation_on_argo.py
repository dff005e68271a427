"""The ablation on Argo Workflows from the chart to a champion, trainings drained and killed on the way: all numbers are a local run's."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from mlflow import MlflowClient
from spectraqlora.artifacts import Evaluation, TrainingLog
from spectraqlora_pipelines.cluster.argo_client import Argo

from tests.cluster.conftest import CLI, Release
from tests.cluster.runs import KILL, artifact, ended, inside, resumed, submit, training_at, training_now
from tests.cluster.services import Store, eventually
from tests.unit.steps.train.test_checkpoints import same

pytestmark = pytest.mark.cluster
STEPS, EVERY = 120, 20
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


def strike(argo: Argo, how: dict[str, Callable[[Any], Any]]) -> dict[str, tuple[Any, int, float]]:
    """Stop each training once it has checkpoints, whichever comes first; its pod, its step, and when that was."""
    struck: dict[str, tuple[Any, int, float]] = {}

    def look() -> bool:
        for method in how.keys() - struck.keys():
            pod, step = training_now(argo, method, of=STEPS)
            if step >= 2 * EVERY + 5:
                struck[method] = pod, step, time.monotonic()
                how[method](pod)
        return len(struck) == len(how)

    eventually(look, 400, every=0.3)
    return struck


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
    core = client.CoreV1Api()
    try:
        sandbox = yaml.safe_load(inside(argo.namespace, training_at(argo, "qlora", 1, of=STEPS), LOOK))
        struck = strike(
            argo,
            {
                "qlora": lambda pod: core.delete_namespaced_pod(pod.metadata.name, argo.namespace),
                "hybrid": lambda pod: inside(argo.namespace, pod, KILL),
            },
        )
        pod, seen_step, began = struck["qlora"]
        last = resumed(argo, "qlora", pod, began)
        assert last >= seen_step, "it wrote a checkpoint when it was told to end"
        pod, _, began = struck["hybrid"]
        assert resumed(argo, "hybrid", pod, began) % EVERY == 0, "it was not told: from the last one"
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
        adapters = own.glob("artifacts/*/train*/adapter")
        (adapter,) = (path for path in adapters if TrainingLog.read(path).method == method)
        same(artifact(argo, store, f"train-{method}", "adapter", tmp_path), adapter)
        evaluations = map(Evaluation.read, own.glob("artifacts/*/re-evaluate*/evaluation"))
        (here,) = (each for each in evaluations if each.method == method)
        there = Evaluation.read(artifact(argo, store, f"re-evaluate-{method}", "evaluation", tmp_path))
        assert numbers(there) == numbers(here)
    champions = [
        MlflowClient(uri).get_model_version_by_alias("spectraqlora", "champion")
        for uri in (release.mlflow, f"sqlite:///{own}/mlflow.db")
    ]
    assert champions[0].tags["method"] == champions[1].tags["method"]
