"""The chart on a real cluster: installed, tested, upgraded, rolled back, uninstalled.

Its hooks ask Kubeflow Pipelines, which is not here: `test_chart.py` runs their own commands against its API.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kubernetes import client
from spectraqlora_pipelines.reference import CHART

from tests.cluster.conftest import ACCOUNT, RELEASE, Release
from tests.cluster.services import eventually
from tests.helm import helm

pytestmark = pytest.mark.cluster


def run_helm(*arguments: str, namespace: str) -> str:
    done = subprocess.run(
        [helm(), *arguments, "--namespace", namespace], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings_of(namespace: str, name: str) -> dict[str, Any]:
    data = client.CoreV1Api().read_namespaced_config_map(name, namespace).data
    return dict(yaml.safe_load(data["settings.yaml"]))


def test_the_test_asks_mlflow_and_an_upgrade_changes_the_settings_until_it_is_rolled_back(
    namespace: str, release: Release
) -> None:
    said = run_helm("test", RELEASE, "--logs", namespace=namespace)
    assert f"http://{ACCOUNT}-mlflow.{namespace}.svc:5000 200" in said
    values = ("--reuse-values", "--set", "pipeline.settings.seed=7", "--wait")
    before = settings_of(namespace, ACCOUNT)
    run_helm("upgrade", RELEASE, str(CHART), *values, namespace=namespace)
    assert settings_of(namespace, ACCOUNT) == {**before, "seed": 7}
    run_helm("rollback", RELEASE, "--wait", namespace=namespace)
    assert settings_of(namespace, ACCOUNT) == before


@pytest.fixture
def own_namespace(namespace: str) -> Iterator[str]:
    core = client.CoreV1Api()
    # One of its own each time: a deleted one takes a while to go.
    name = core.create_namespace({"metadata": {"generateName": f"{RELEASE}-chart-"}}).metadata.name
    yield name
    core.delete_namespace(name)


@pytest.mark.parametrize("case", ["minimal", "full"])
def test_every_object_is_taken_by_the_api_server_and_goes_with_the_release_but_the_cache(
    case: str, own_namespace: str
) -> None:
    core, policies = client.CoreV1Api(), client.NetworkingV1Api()
    file = CHART / "ci" / f"{case}-values.yaml"
    run_helm("install", "r", str(CHART), "--values", str(file), "--no-hooks", namespace=own_namespace)
    objects = [
        part for part in yaml.safe_load_all(run_helm("get", "manifest", "r", namespace=own_namespace)) if part
    ]
    kinds = {part["kind"] for part in objects}
    always = {"ConfigMap", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy"}
    more = {"Deployment", "Service", "Ingress", "PersistentVolumeClaim", "ResourceQuota", "LimitRange"}
    assert kinds == (always | more if case == "full" else always)
    assert policies.list_namespaced_network_policy(own_namespace).items
    run_helm("upgrade", "r", str(CHART), "--values", str(file), "--no-hooks",
             "--set", "pipeline.settings.seed=7", namespace=own_namespace)  # fmt: skip
    name = next(part["metadata"]["name"] for part in objects if "settings.yaml" in part.get("data", {}))
    assert settings_of(own_namespace, name)["seed"] == 7
    run_helm("rollback", "r", "--no-hooks", namespace=own_namespace)
    assert "seed" not in settings_of(own_namespace, name)
    run_helm("uninstall", "r", "--no-hooks", namespace=own_namespace)
    claims = [
        claim.metadata.name for claim in core.list_namespaced_persistent_volume_claim(own_namespace).items
    ]
    assert claims == (["tuning-cache"] if case == "full" else [])
    # What Kubernetes itself puts into every namespace stays.
    eventually(lambda: not policies.list_namespaced_network_policy(own_namespace).items, 30)
    left = [account.metadata.name for account in core.list_namespaced_service_account(own_namespace).items]
    assert left == ["default"]
