"""Faults that take minutes or a second node: what a user sees, and that nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes import client
from spectraqlora.runtime.images import image_reference
from spectraqlora_pipelines.cluster.argo_client import Argo

from tests.cluster.conftest import RELEASE, Release, hand_over, program, workflows
from tests.cluster.runs import SEES_WITHIN_S, ended, pods_of, resumed, sees, spectraqlora, submit, training_at
from tests.cluster.services import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("sample")]
GPU = "nvidia.com/gpu"
NODE_GIB = 10
TAINT = "cluster-test"
ONE_METHOD = ("--set", "methods=qlora", "--set", "evaluate.accuracy_rows=8", "--set", "train.evaluations=2")


def changed_values(release: Release, folder: Path, changes: dict[str, object]) -> Path:
    """The release's values file with other entries of some steps."""
    values = yaml.safe_load(release.values.read_text())
    (folder / "values.yaml").write_text(yaml.safe_dump({**values, **changes}))
    return folder / "values.yaml"


@pytest.fixture(scope="module")
def last_node(namespace: str) -> str:
    """A node beside the first; one that is started for it has the images of the steps that are sent there."""
    core = client.CoreV1Api()
    if program() and len(core.list_node().items) < 2:
        free = shutil.disk_usage(os.environ.get("CLUSTER_HOME", tempfile.gettempdir())).free >> 30
        if free < NODE_GIB:
            pytest.skip(f"{free} GiB of disk are free, and the images take {NODE_GIB} on a node")
        started = subprocess.run([program(), "node2"], check=False, capture_output=True, text=True)
        if started.returncode:
            pytest.skip(f"no second node: {(started.stderr.strip() or '-').splitlines()[-1]}")
        hand_over([image_reference(step) for step in ("quantize-load", "train")])
    names = [str(node.metadata.name) for node in core.list_node().items]
    if len(names) < 2:
        pytest.skip("one node alone")
    return names[-1]


@pytest.fixture
def second_node(last_node: str) -> Iterator[str]:
    """That node, which takes only what tolerates it; one that was started for it takes nothing afterwards."""
    core = client.CoreV1Api()
    core.patch_node(
        last_node,
        {
            "metadata": {"labels": {TAINT: "yes"}},
            "spec": {"unschedulable": False, "taints": [{"key": TAINT, "effect": "NoSchedule"}]},
        },
    )
    yield last_node
    after = {"unschedulable": bool(program()), "taints": None}
    core.patch_node(last_node, {"metadata": {"labels": {TAINT: None}}, "spec": after})


def test_a_step_waits_for_the_node_that_it_may_run_on_until_that_has_a_gpu(
    argo: Argo, release: Release, second_node: str, tmp_path: Path
) -> None:
    """No device is there: the node says that it has one, which is what the scheduler goes by."""
    place = {
        "node_selector": {TAINT: "yes"},
        "tolerations": [{"key": TAINT, "operator": "Exists", "effect": "NoSchedule"}],
        "gpu": {"count": 1},
    }
    values = changed_values(release, tmp_path, {"steps": {"quantize-load": place}})
    began = time.monotonic()
    submit(argo, release, *ONE_METHOD, values=values)
    sees(argo, "quantize-load", f"^no node has room for it.*Insufficient {GPU}", began)
    given = {GPU: "4"}
    client.CoreV1Api().patch_node_status(second_node, {"status": {"capacity": given, "allocatable": given}})
    began = time.monotonic()
    (pod,) = eventually(lambda: [p for p in pods_of(argo, "quantize-load") if p.spec.node_name], 60)
    assert pod.spec.node_name == second_node
    eventually(lambda: pods_of(argo, "quantize-load")[0].status.phase == "Succeeded", 180)
    print(f"on {second_node} after {time.monotonic() - began:.0f} s")


def test_a_training_whose_node_is_drained_resumes_on_another(
    argo: Argo, release: Release, second_node: str, tmp_path: Path
) -> None:
    place = {
        "affinity": [{"weight": 100, "rules": [{"key": TAINT, "values": ["yes"]}]}],
        "tolerations": [{"key": TAINT, "operator": "Exists", "effect": "NoSchedule"}],
    }
    values = changed_values(release, tmp_path, {"steps": {"train": place}})
    submit(argo, release, *ONE_METHOD, "--set", "train.max_steps=200", values=values)
    first = training_at(argo, "qlora", 25, of=200)
    assert first.spec.node_name == second_node
    began = time.monotonic()
    command = ["kubectl", "drain", second_node, "--ignore-daemonsets", "--delete-emptydir-data"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as draining:
        assert draining.wait(180) == 0
    assert resumed(argo, "qlora", first, began) >= 25
    newest = pods_of(argo, "train", "qlora")[-1]
    assert newest.spec.node_name not in ("", second_node)
    assert ended(argo, 600)[0] == "SUCCEEDED"


def test_a_step_that_writes_more_than_it_may_is_named_and_not_tried_again(
    argo: Argo, release: Release
) -> None:
    core, name = client.CoreV1Api(), RELEASE
    limit = {
        "type": "Container",
        "default": {"ephemeral-storage": "300Ki"},
        "defaultRequest": {"ephemeral-storage": "0"},
    }
    core.create_namespaced_limit_range(
        argo.namespace, {"metadata": {"name": name}, "spec": {"limits": [limit]}}
    )
    try:
        began = time.monotonic()
        # The kubelet adds up what a pod has written once a minute: the training is there for longer.
        submit(argo, release, *ONE_METHOD, "--set", "train.max_steps=5000")
        step = sees(argo, "", "^it wrote more than its ephemeral-storage limit", began)
        state, attempts = ended(argo, SEES_WITHIN_S)
        assert state == "FAILED" and attempts[step] == 1, "another attempt would write as much"
    finally:
        core.delete_namespaced_limit_range(name, argo.namespace)


def test_a_training_that_finds_no_mlflow_is_tried_again(argo: Argo, release: Release, tmp_path: Path) -> None:
    def scale(replicas: int) -> None:
        client.AppsV1Api().patch_namespaced_deployment_scale(
            f"{RELEASE}-mlflow", argo.namespace, {"spec": {"replicas": replicas}}
        )

    patient = {"steps": {"train": {"retries": {"attempts": 8, "backoff": "5s"}}}}
    submit(argo, release, *ONE_METHOD, values=changed_values(release, tmp_path, patient))
    eventually(lambda: pods_of(argo, "snr-analyze"), 180)  # What comes before has asked MLflow already.
    scale(0)
    try:
        step = sees(argo, "", r"^error: no answer: tracking\.uri", time.monotonic())
    finally:
        scale(1)
    began = time.monotonic()
    state, attempts = ended(argo, 600)
    print(f"the run ended {time.monotonic() - began:.0f} s after MLflow was started again")
    assert state == "SUCCEEDED" and attempts[step] > 1


def test_a_schedule_fires_and_its_second_run_finds_nothing_new(
    argo: Argo, release: Release, tmp_path: Path
) -> None:
    others = set(workflows(argo.namespace))  # Argo still deletes their artifacts.
    spectraqlora(
        "schedule", "create", RELEASE, "--every", "1m", "--config", str(release.settings),
        "--values", str(release.values), "--set", "retrain.method=qlora", *ONE_METHOD[2:], "--set", "train.max_steps=20",
        namespace=argo.namespace,
    )  # fmt: skip
    try:
        (first,) = eventually(lambda: set(workflows(argo.namespace)) - others, 120)
        state, attempts = ended(argo, 900)
        assert state == "SUCCEEDED" and attempts["train-qlora-round-1"] == 1
        began = time.monotonic()
        eventually(lambda: set(workflows(argo.namespace)) - others - {first}, 120)
        state, attempts = ended(argo, 300)
        print(f"the second run ended {time.monotonic() - began:.0f} s after the first")
        assert state == "SUCCEEDED" and not attempts.get("train-qlora-round-1")
    finally:
        spectraqlora("schedule", "delete", RELEASE, namespace=argo.namespace)
