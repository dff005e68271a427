"""The Kubernetes cluster with Argo Workflows that these tests use: the one that is there, never a fake.

KUBECONFIG names it; else SPECTRAQLORA_TEST_CLUSTER names a program that starts one by `argo`, prints its variables by
`env` and takes images by `load`. SPECTRAQLORA_TEST_NAMESPACE is a namespace that Argo's controller watches, kubeflow
unless told; the store of the controller's artifacts is in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from kubernetes.client import ApiException
from spectraqlora.errors import InputError
from spectraqlora.runtime.images import image_reference, images
from spectraqlora_pipelines.cluster.argo_client import RUN, Argo
from spectraqlora_pipelines.reference import CHART

from tests.cluster.services import BUCKET, S3_SECRET, S3_SERVICE, Store, eventually, reached
from tests.helm import helm

CLI = [sys.executable, "-m", "spectraqlora_pipelines.cli"]
GROUP = ("argoproj.io", "v1alpha1")
RELEASE = "cluster-test"
ACCOUNT = RELEASE
"""The release's objects, the steps' account among them, have its name."""
DATABASE = f"{RELEASE}-database"
PREFIX = f"{RELEASE}/{os.getpid()}"
"""What the tests keep in the store is below this."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin after SPECTRAQLORA_TEST_UNTIL, seconds since 1970, where CI's time is nearly over."""
    if time.time() > float(os.environ.get("SPECTRAQLORA_TEST_UNTIL", "inf")):
        pytest.skip("no time is left")


def program() -> str:
    """The program that starts a cluster; empty where KUBECONFIG names one."""
    return os.environ.get("SPECTRAQLORA_TEST_CLUSTER", "")


@pytest.fixture(scope="session")
def namespace() -> str:
    """The namespace of the runs, on a cluster whose nodes have the images."""
    if not os.environ.get("KUBECONFIG"):
        if not program():
            pytest.skip("no cluster: KUBECONFIG, or SPECTRAQLORA_TEST_CLUSTER, names one")
        started = subprocess.run([program(), "argo"], check=False, stderr=subprocess.PIPE, text=True)
        if started.returncode:
            pytest.skip(f"no cluster: {program()} argo: {(started.stderr.strip() or '-').splitlines()[-1]}")
        told = subprocess.run([program(), "env"], check=True, capture_output=True, text=True).stdout
        for name, value in re.findall(r"(KUBECONFIG|PATH)=(\S+)", told):
            os.environ[name] = value.replace("$PATH", os.environ["PATH"])
    name = os.environ.get("SPECTRAQLORA_TEST_NAMESPACE", "kubeflow")
    try:
        Argo(name).schedules()
    except InputError as error:
        pytest.skip(f"no cluster with Argo Workflows: {error}")
    if program():
        load_images(name)
    return name


def load_images(namespace: str) -> None:
    """Hand the Docker engine's images to the program's nodes, as far as they have not got them yet.

    A ConfigMap of the namespace says which they have; where a node is new, all are given to all nodes.
    """
    wanted = [image_reference(name) for name in (*images(), "mlflow")]
    asked = ["docker", "image", "inspect", "--format", "{{.Id}}", *wanted]
    told = subprocess.run(asked, check=False, capture_output=True, text=True)
    if told.returncode:
        pytest.skip(f"no images (make images): {(told.stderr.strip() or '-').splitlines()[-1]}")
    ids = dict(
        zip((name.replace("/", "_").replace(":", "-") for name in wanted), told.stdout.split(), strict=True)
    )
    core, meta = client.CoreV1Api(), {"name": "spectraqlora-test-images"}
    nodes = " ".join(sorted(node.metadata.uid for node in core.list_node().items))
    try:
        known = core.read_namespaced_config_map(meta["name"], namespace).data or {}
    except ApiException as error:
        assert error.status == 404, error
        known = core.create_namespaced_config_map(namespace, {"metadata": meta}).data or {}
    same_nodes = known.get("nodes") == nodes
    new = [n for n, key in zip(wanted, ids, strict=True) if not same_nodes or known.get(key) != ids[key]]
    if new:
        hand_over(new)
        core.patch_namespaced_config_map(meta["name"], namespace, {"data": {**ids, "nodes": nodes}})


def hand_over(images: list[str]) -> None:
    """Load images of the Docker engine into all of the program's nodes."""
    with subprocess.Popen(["docker", "save", *images], stdout=subprocess.PIPE) as saved:
        loaded = subprocess.run(
            [program(), "load", "-"], stdin=saved.stdout, check=False, capture_output=True, text=True
        )
    if loaded.returncode:
        pytest.skip(f"the cluster does not take the images: {loaded.stderr.strip().splitlines()[-1:]}")


@pytest.fixture(scope="session")
def store(namespace: str) -> Iterator[Store]:
    """The cluster's S3."""
    with reached(namespace, S3_SERVICE, 9000) as endpoint:
        found = Store(namespace, endpoint)
        yield found
        found.remove(PREFIX)


@pytest.fixture(scope="session")
def sample(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The offline sample's model and data in the store, where the release's settings look for them."""
    folder = tmp_path_factory.mktemp("sample") / "files"
    subprocess.run([*CLI, "sample", str(folder)], check=True, stdout=subprocess.DEVNULL)
    store.put(folder, f"{PREFIX}/sample")


@dataclass(frozen=True)
class Release:
    """What the chart has installed.

    Args:
        settings: file of the runs' settings.
        values: file that says how their steps run.
        mlflow: address of its MLflow, from this machine.
    """

    settings: Path
    values: Path
    mlflow: str


def chart_values(store: Store) -> dict[str, Any]:
    """Values of a release on Argo Workflows with an MLflow of its own, for this cluster."""
    values = yaml.safe_load((CHART / "ci/argo-values.yaml").read_text())
    values["fullnameOverride"] = RELEASE
    # Its database goes with its pod, and the last node is the one that tests drain.
    last = client.CoreV1Api().list_node().items[-1].metadata.name
    elsewhere = {
        "matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [last]}]
    }
    preferred = [{"weight": 100, "preference": elsewhere}]
    values["mlflow"]["server"] |= {
        "workers": 1,
        "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}},
        "database": {"secret": DATABASE},
        "artifacts": f"s3://{BUCKET}/{PREFIX}/mlflow",
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
        "allowedHosts": ["*"],  # Here it is called by the addresses that this machine has.
    }
    return values | {
        "secrets": {"s3": {"name": S3_SECRET, "accessKey": "accesskey", "secretKey": "secretkey"}},
        "s3": {"endpointUrl": store.inside},
    }


@pytest.fixture(scope="session")
def release(namespace: str, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """The chart on this cluster: MLflow, the steps' account and role, settings and values file."""
    folder, core = tmp_path_factory.mktemp("release"), client.CoreV1Api()
    try:
        core.create_namespaced_secret(
            namespace, {"metadata": {"name": DATABASE}, "stringData": {"uri": "sqlite:////tmp/mlflow.db"}}
        )
    except ApiException as error:
        assert error.status == 409, error
    values = chart_values(store)
    values["pipeline"] = {
        "name": "ablation",
        "settings": {
            "model": {"base_model": f"s3://{BUCKET}/{PREFIX}/sample/model"},
            "data": {"source": f"s3://{BUCKET}/{PREFIX}/sample/data.jsonl"},
            "checkpoint": {"destination": f"s3://{BUCKET}/{PREFIX}/checkpoints", "every_steps": 20},
        },
        "values": {
            # As many threads as a local run is given, and room for two steps on two cores.
            "argo": {"parallelism": 2},
            "defaults": {
                "cpu": {"request": "100m"},
                "env": {"OMP_NUM_THREADS": "1"},
                "retries": {"backoff": "1s"},
            },
        },
    }
    (folder / "chart.yaml").write_text(yaml.safe_dump(values))
    subprocess.run(
        [helm(), "upgrade", "--install", RELEASE, str(CHART), "--namespace", namespace,
         "--values", str(folder / "chart.yaml"), "--wait", "--timeout", "5m"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    data = core.read_namespaced_config_map(ACCOUNT, namespace).data
    for name, text in data.items():
        (folder / name).write_text(text)
    with reached(namespace, f"{ACCOUNT}-mlflow", 5000) as mlflow:
        yield Release(folder / "settings.yaml", folder / "cluster-values.yaml", mlflow)
    forget(namespace)
    subprocess.run(
        [helm(), "uninstall", RELEASE, "--namespace", namespace], check=True, stdout=subprocess.DEVNULL
    )
    core.delete_namespaced_secret(DATABASE, namespace)


def workflows(namespace: str, release: str = RELEASE) -> list[str]:
    """Names of the tests' runs that are there."""
    found = client.CustomObjectsApi().list_namespaced_custom_object(
        *GROUP, namespace, "workflows", label_selector=f"{RUN}={release}"
    )
    return [workflow["metadata"]["name"] for workflow in found["items"]]


def forget(namespace: str, release: str = RELEASE) -> None:
    """Wait until Argo has deleted the tests' runs and their artifacts, for which it needs the release's account.

    A run that has no artifact is never let go by Argo 4.0.5, which waits for the pod that would delete them; and a store
    that refuses is asked for minutes. `test_artifacts.py` is about what Argo deletes.
    """
    objects, patient_until = client.CustomObjectsApi(), time.monotonic() + 20

    def left() -> list[str]:
        names = workflows(namespace, release)
        for name in names:
            with contextlib.suppress(ApiException):  # It has just gone.
                found = objects.get_namespaced_custom_object(*GROUP, namespace, "workflows", name)
                nodes = found.get("status", {}).get("nodes", {}).values()
                made = any(node.get("outputs", {}).get("artifacts") for node in nodes)
                if not made or time.monotonic() > patient_until:
                    objects.patch_namespaced_custom_object(
                        *GROUP, namespace, "workflows", name, {"metadata": {"finalizers": None}}
                    )
        return names

    eventually(lambda: not left(), 180, every=2)


@pytest.fixture
def argo(namespace: str, release: Release) -> Iterator[Argo]:
    """Argo Workflows; runs of the test and their templates go at its end."""
    yield Argo(namespace)
    objects, of_test = client.CustomObjectsApi(), f"{RUN}={RELEASE}"
    for name in workflows(namespace):
        # One that runs is not deleted before it has ended: Argo deletes its artifacts first.
        objects.patch_namespaced_custom_object(
            *GROUP, namespace, "workflows", name, {"spec": {"shutdown": "Terminate"}}
        )
    objects.delete_collection_namespaced_custom_object(*GROUP, namespace, "workflows", label_selector=of_test)
    objects.delete_namespaced_custom_object(*GROUP, namespace, "workflowtemplates", f"spectraqlora-{RELEASE}")
