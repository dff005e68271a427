"""What a real cluster with Argo Workflows makes of our objects, and what a user sees of a run that cannot go on."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client import ApiException
from spectraqlora.settings import parse
from spectraqlora_pipelines.cluster.argo_client import Argo
from spectraqlora_pipelines.cluster.values import read_values
from spectraqlora_pipelines.dags.argo import template_for

from tests.cluster.conftest import ACCOUNT, GROUP, Release
from tests.cluster.runs import SEES_WITHIN_S, ended, sees, spectraqlora, submit

pytestmark = [pytest.mark.cluster, pytest.mark.core]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SETTINGS = (
    *("--set", "model.base_model=/nowhere/model", "--set", "data.source=/nowhere/data.jsonl"),
    *("--set", "tracking.uri=http://127.0.0.1:9", "--set", "tracking.patience_seconds=1"),
)


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


def seen(argo: Argo, release: Release, values: str, folder: Path, expected: str) -> None:
    """Start a run and wait until its first step has the expected reason."""
    (folder / "values.yaml").write_text(f"run: {{service_account: {ACCOUNT}}}\n{values}")
    began = time.monotonic()
    submit(argo, release, "--set", "methods=hybrid", *SETTINGS, values=folder / "values.yaml")
    sees(argo, "quantize-load", expected, began)


def test_an_image_that_is_not_there_is_named(argo: Argo, release: Release, tmp_path: Path) -> None:
    seen(
        argo,
        release,
        "defaults: {image: {tag: none-such}}",
        tmp_path,
        r"^its image cannot be fetched: image\.registry",
    )


def test_a_secret_that_is_not_there_is_named(argo: Argo, release: Release, tmp_path: Path) -> None:
    values = "defaults: {secrets: [{name: none-such, env: {HF_TOKEN: token}}]}"
    seen(
        argo,
        release,
        values,
        tmp_path,
        r"^a Secret or ConfigMap that the values file names is missing.*none-such",
    )


def attempts_at_the_end(argo: Argo) -> int:
    """How often the failed run's first step began."""
    state, attempts = ended(argo, SEES_WITHIN_S)
    assert state == "FAILED"
    return attempts["quantize-load"]


def test_a_base_that_is_not_there_ends_the_run_after_one_attempt(
    argo: Argo, release: Release, tmp_path: Path
) -> None:
    seen(
        argo,
        release,
        "defaults: {retries: {backoff: 1s}}",
        tmp_path,
        r"^error: model\.base_model: '/nowhere/model'",
    )
    assert attempts_at_the_end(argo) == 1


def test_a_step_that_needs_more_memory_than_it_may_use_is_not_tried_again(
    argo: Argo, release: Release, tmp_path: Path
) -> None:
    # Of this step alone: the others have what they need.
    values = "defaults: {retries: {backoff: 1s}}\nsteps: {quantize-load: {memory: {limit: 30Mi}}}"
    seen(argo, release, values, tmp_path, r"^it needed more memory than memory\.limit")
    assert attempts_at_the_end(argo) == 1
