"""What a real cluster with Argo Workflows makes of our objects, and what a user sees of a run that cannot go on."""

from __future__ import annotations

import copy
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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
from tests.cluster.services import eventually

pytestmark = pytest.mark.cluster
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


def create_schedule(namespace: str, name: str, *more: str) -> str:
    """What the command says."""
    return spectraqlora(
        "schedule", "create", name, "--cron", "0 3 1 1 *", *SETTINGS, *more, namespace=namespace
    )


def test_a_schedule_is_created_changed_paused_resumed_and_deleted(namespace: str) -> None:
    create = functools.partial(create_schedule, namespace)
    listed = functools.partial(spectraqlora, "schedule", "list", namespace=namespace)
    own = ("--paused", "--owner", "cluster-test")

    assert "created" in create("cluster-test-a", *own) and "paused" in listed()
    assert "unchanged" in create("cluster-test-a", *own)
    assert "changed" in create("cluster-test-a", *own, "--set", "seed=7")
    spectraqlora("schedule", "resume", "cluster-test-a", namespace=namespace)
    assert "active" in listed()
    spectraqlora("schedule", "pause", "cluster-test-a", namespace=namespace)
    assert "cluster-test-a deleted: cluster-test keeps it no more" in create("cluster-test-b", *own)
    assert "cluster-test-a" not in listed() and "cluster-test-b" in listed()
    for said in ("deleted", "was not there"):
        assert said in spectraqlora("schedule", "delete", "cluster-test-b", namespace=namespace)


def patch_schedule(namespace: str, name: str, metadata: dict[str, Any]) -> None:
    """As another program writes it."""
    client.CustomObjectsApi().patch_namespaced_custom_object(
        *GROUP, namespace, "cronworkflows", name, {"metadata": metadata}
    )


def test_a_schedule_is_gone_when_it_is_said_to_be_deleted_however_slowly_kubernetes_lets_it_go(
    namespace: str,
) -> None:
    name = "test-slow"
    create_schedule(namespace, name, "--paused")
    assert name in spectraqlora("schedule", "list", namespace=namespace)
    patch_schedule(namespace, name, {"finalizers": ["cluster-test/slow"]})
    argo = Argo(namespace)
    with ThreadPoolExecutor() as pool:
        deleting = pool.submit(argo.change, name, "delete")
        try:
            eventually(lambda: name not in spectraqlora("schedule", "list", namespace=namespace), 30)
            time.sleep(1)
            assert not deleting.done(), "it is still there"
            let_go = threading.Timer(2, patch_schedule, (namespace, name, {"finalizers": None}))
            let_go.start()
            # What is leaving is not changed, but waited for.
            assert "created" in create_schedule(namespace, name, "--paused")
        finally:
            patch_schedule(namespace, name, {"finalizers": None})
        assert deleting.result() is True
    assert name in spectraqlora("schedule", "list", namespace=namespace)
    assert argo.change(name, "delete") and not argo.change(name, "delete")


def test_a_schedule_that_another_writes_at_the_same_time_is_changed_all_the_same(namespace: str) -> None:
    class Late(Argo):
        """Another program, as Argo's controller, writes after each read but the last."""

        written = 0

        def _settled(self, kind: str, name: str) -> dict[str, Any] | None:
            there = super()._settled(kind, name)
            if self.written < 3:
                self.written += 1
                patch_schedule(namespace, name, {"annotations": {"cluster-test": str(self.written)}})
            return there

    name = "test-both"
    create_schedule(namespace, name, "--paused")
    argo = Late(namespace)
    argo.change(name, "resume")
    (schedule,) = (cron for cron in argo.schedules() if cron["metadata"]["name"] == name)
    assert argo.written == 3 and schedule["metadata"]["annotations"]["cluster-test"] == "3"
    assert schedule["spec"]["suspend"] is False
    assert Argo(namespace).change(name, "delete")


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
