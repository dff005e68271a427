"""Runs on the cluster, started and looked at by the command line as a user does it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.stream import stream
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.cluster.argo_client import Argo
from spectraqlora_pipelines.cluster.argo_view import ArgoViewer
from spectraqlora_pipelines.cluster.pods import RUN_OF_ARGO, Pods
from typer.testing import CliRunner

from tests.cluster.conftest import RELEASE, Release
from tests.cluster.services import Store, eventually

SEES_WITHIN_S = 180
"""On two busy cores; README.md has what was measured."""


def spectraqlora(*arguments: str, namespace: str) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app.app, [*arguments, "--target", "argo", "--namespace", namespace])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def submit(argo: Argo, release: Release, *options: str, values: Path | None = None) -> None:
    """Start a run of the chart's settings, with the chart's values file or another."""
    spectraqlora(
        "submit", "--name", RELEASE, "--pipeline-name", f"spectraqlora-{RELEASE}",
        "--config", str(release.settings), "--values", str(values or release.values), *options,
        namespace=argo.namespace,
    )  # fmt: skip


def sees(argo: Argo, label: str, expected: str, began: float) -> str:
    """Wait until the reason that `status` shows of a step is the expected one; tell it and the seconds since `began`.

    Without a label it is any step's. The answer is the step's label.
    """
    viewer, seen = ArgoViewer(argo), set[str]()
    while time.monotonic() - began < SEES_WITHIN_S:
        for of, reason in viewer.look(RELEASE).reasons.items():
            if label in ("", of) and re.search(expected, reason):
                print(f"{of}: {reason} ({time.monotonic() - began:.0f} s)")
                return of
            seen.add(f"{of}: {reason}")
        time.sleep(0.5)
    raise AssertionError(f"{expected!r} was not seen of {label or 'any step'}, but {seen}")


def ended(argo: Argo, within_s: float) -> tuple[str, dict[str, int]]:
    """State of the run when it has ended, and how often each step began."""
    viewer = ArgoViewer(argo)

    def look() -> Any:
        view = viewer.look(RELEASE)
        return view if view.ended else None

    view = eventually(look, within_s, every=1)
    return view.run.state, {step.label: step.attempts for step in view.tree.leaves()}


def pods_of(argo: Argo, step: str, method: str = "") -> list[Any]:
    """The pods of a step that are there, oldest first."""
    run = argo.workflow(RELEASE)["metadata"]["name"]
    return Pods(argo.namespace, RUN_OF_ARGO).of(run, step, method)


KILL = """
import os, pathlib
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    if path.read_bytes().split(b"\\0")[1:4] == [b"-m", b"spectraqlora", b"train"]:
        os.kill(int(path.parent.name), 9)
"""
"""Run inside of a train step: kills its process, as a lost node does. It is told nothing, which a forced deletion of its pod
does not promise: the kubelet may let a pod that is gone from the API end as any other."""


def inside(namespace: str, pod: Any, code: str) -> str:
    """What Python code prints in a step's container."""
    return str(
        stream(
            client.CoreV1Api().connect_get_namespaced_pod_exec, pod.metadata.name, namespace,
            container="main", command=["python3", "-c", code], stdin=False, stdout=True, stderr=True, tty=False,
        )
    )  # fmt: skip


def log_of(argo: Argo, pod: Any) -> str:
    """What a pod has printed."""
    return Pods(argo.namespace, RUN_OF_ARGO).log(pod.metadata.name)


def training_now(argo: Argo, method: str, of: int) -> tuple[Any, int]:
    """A training's pod and the step, of so many, that it has come to; none and 0 before its first."""
    for pod in pods_of(argo, "train", method):
        if done := re.findall(rf"(\d+)/{of} .*training step", log_of(argo, pod)):
            return pod, int(done[-1])
    return None, 0


def training_at(argo: Argo, method: str, step: int, of: int) -> Any:
    """The pod of a training that has come to a step of so many."""

    def look() -> Any:
        pod, done = training_now(argo, method, of)
        return pod if done >= step else None

    return eventually(look, 400, every=0.3)


def resumed(argo: Argo, method: str, first: Any, began: float) -> int:
    """The step that the second pod of a training resumes from; tells it and the seconds since `began`."""

    def look() -> int:
        for pod in pods_of(argo, "train", method):
            found = re.search(r"resuming from the checkpoint of step (\d+)", log_of(argo, pod))
            if pod.metadata.uid != first.metadata.uid and found:
                print(f"train ({method}): {found[0]} ({time.monotonic() - began:.0f} s)")
                return int(found[1])
        return 0

    return int(eventually(look, SEES_WITHIN_S))


def artifact(argo: Argo, store: Store, template: str, name: str, folder: Path) -> Path:
    """An output artifact of the newest run, fetched from Argo's repository."""
    (key,) = {
        found["s3"]["key"]
        for node in argo.workflow(RELEASE)["status"]["nodes"].values()
        if node.get("templateName") == template and node["phase"] == "Succeeded"
        for found in node.get("outputs", {}).get("artifacts", [])
        if found["name"] == name
    }
    return store.get(key, folder / template / name)
