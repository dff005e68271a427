"""What a real cluster with Argo Workflows makes of our objects, and what a user sees of a run that cannot go on."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client import ApiException
from spectraqlora.settings import parse
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.cluster.argo_client import RUN, Argo
from spectraqlora_pipelines.cluster.argo_view import ArgoViewer
from spectraqlora_pipelines.cluster.values import read_values
from spectraqlora_pipelines.dags.argo import template_for
from typer.testing import CliRunner

from tests.cluster.conftest import ACCOUNT

pytestmark = pytest.mark.cluster
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
GROUP = ("argoproj.io", "v1alpha1")
SEES_WITHIN_S = 180
"""On two busy cores; README.md has what was measured."""
SETTINGS = (
    *("--set", "model.base_model=/nowhere/model", "--set", "data.source=/nowhere/data.jsonl"),
    *("--set", "tracking.uri=http://127.0.0.1:9", "--set", "tracking.patience_seconds=1"),
)


def spectraqlora(*arguments: str, namespace: str) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app.app, [*arguments, "--target", "argo", "--namespace", namespace])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize("kind", ["ablation", "retraining"])
def test_the_api_server_takes_every_step_by_argos_full_schema(kind: Any, namespace: str) -> None:
    document = template_for(kind, parse({"rounds": 2}), read_values(GOLDEN / "values-full.yaml"))
    tasks = {template["name"]: template for template in document["spec"]["templates"]}

    def check(tasks: dict[str, Any]) -> None:
        # Of all of Argo's objects this one has the templates' full schema wherever Argo is installed.
        body = {"apiVersion": "/".join(GROUP), "kind": "WorkflowTaskSet", "metadata": {"name": "check"}}
        client.CustomObjectsApi().create_namespaced_custom_object(
            *GROUP, namespace, "workflowtasksets", {**body, "spec": {"tasks": tasks}},
            dry_run="All", field_validation="Strict",
        )  # fmt: skip

    check(tasks)
    wrong = copy.deepcopy(tasks)
    wrong["compare"]["container"]["volumMounts"] = []
    with pytest.raises(ApiException) as refused:
        check(wrong)
    assert "spec.tasks.compare.container.volumMounts" in refused.value.body


def test_a_schedule_is_created_changed_paused_resumed_and_deleted(namespace: str) -> None:
    def create(name: str, *more: str) -> str:
        return spectraqlora(
            "schedule", "create", name, "--cron", "0 3 1 1 *", "--owner", "cluster-test", *SETTINGS, *more,
            namespace=namespace,
        )  # fmt: skip

    def listed() -> str:
        return spectraqlora("schedule", "list", namespace=namespace)

    assert "created" in create("cluster-test-a", "--paused") and "paused" in listed()
    assert "unchanged" in create("cluster-test-a", "--paused")
    assert "changed" in create("cluster-test-a", "--paused", "--set", "seed=7")
    spectraqlora("schedule", "resume", "cluster-test-a", namespace=namespace)
    assert "active" in listed()
    spectraqlora("schedule", "pause", "cluster-test-a", namespace=namespace)
    assert "cluster-test-a deleted: cluster-test keeps it no more" in create("cluster-test-b", "--paused")
    assert "cluster-test-a" not in listed() and "cluster-test-b" in listed()
    for said in ("deleted", "was not there"):
        assert said in spectraqlora("schedule", "delete", "cluster-test-b", namespace=namespace)


@pytest.fixture
def argo(namespace: str) -> Iterator[Argo]:
    """Argo Workflows; runs of the test and their template go at its end."""
    yield Argo(namespace)
    objects, of_test = client.CustomObjectsApi(), f"{RUN}=cluster-test"
    found = objects.list_namespaced_custom_object(*GROUP, namespace, "workflows", label_selector=of_test)
    for workflow in found["items"]:
        # One that runs is not deleted before it has ended: Argo deletes its artifacts first.
        objects.patch_namespaced_custom_object(
            *GROUP, namespace, "workflows", workflow["metadata"]["name"], {"spec": {"shutdown": "Terminate"}}
        )
    objects.delete_collection_namespaced_custom_object(*GROUP, namespace, "workflows", label_selector=of_test)
    objects.delete_namespaced_custom_object(
        *GROUP, namespace, "workflowtemplates", "spectraqlora-cluster-test"
    )


def seen(argo: Argo, values: str, folder: Path, expected: str) -> None:
    """Start a run and wait until its first step has the expected reason; prints after how many seconds that was."""
    (folder / "values.yaml").write_text(f"run: {{service_account: {ACCOUNT}}}\n{values}")
    began = time.monotonic()
    spectraqlora(
        "submit", "--values", str(folder / "values.yaml"), "--name", "cluster-test", "--pipeline-name",
        "spectraqlora-cluster-test", "--set", "methods=hybrid", *SETTINGS, namespace=argo.namespace,
    )  # fmt: skip
    viewer, reason = ArgoViewer(argo), ""
    while time.monotonic() - began < SEES_WITHIN_S:
        reason = viewer.look("cluster-test").reasons.get("quantize-load", "")
        if re.search(expected, reason):
            print(f"{reason} ({time.monotonic() - began:.0f} s)")
            return
        time.sleep(1)
    raise AssertionError(f"{expected!r} was not seen, but {reason!r}")


def test_an_image_that_is_not_there_is_named(argo: Argo, tmp_path: Path) -> None:
    seen(
        argo,
        "defaults: {image: {tag: none-such}}",
        tmp_path,
        r"^its image cannot be fetched: image\.registry",
    )


def test_a_secret_that_is_not_there_is_named(argo: Argo, tmp_path: Path) -> None:
    values = "defaults: {secrets: [{name: none-such, env: {HF_TOKEN: token}}]}"
    seen(argo, values, tmp_path, r"^a Secret or ConfigMap that the values file names is missing.*none-such")


def attempts_at_the_end(argo: Argo) -> int:
    """How often the failed run's first step began."""
    viewer, ends = ArgoViewer(argo), time.monotonic() + SEES_WITHIN_S
    while not (view := viewer.look("cluster-test")).ended and time.monotonic() < ends:
        time.sleep(1)
    assert view.run.state == "FAILED"
    # close-runs fails as well here, for want of an MLflow.
    return {step.label: step.attempts for step in view.failed()}["quantize-load"]


def test_a_base_that_is_not_there_ends_the_run_after_one_attempt(argo: Argo, tmp_path: Path) -> None:
    seen(argo, "defaults: {retries: {backoff: 1s}}", tmp_path, r"^error: model\.base_model: '/nowhere/model'")
    assert attempts_at_the_end(argo) == 1


def test_a_step_that_needs_more_memory_than_it_may_use_is_not_tried_again(argo: Argo, tmp_path: Path) -> None:
    # Of this step alone: the others have what they need.
    values = "defaults: {retries: {backoff: 1s}}\nsteps: {quantize-load: {memory: {limit: 30Mi}}}"
    seen(argo, values, tmp_path, r"^it needed more memory than memory\.limit")
    assert attempts_at_the_end(argo) == 1
