"""What a cluster's values file gives to a placed task."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl
from spectraqlora.steps.quantize_load.component import quantize_load
from spectraqlora_pipelines.cluster.values import read_values
from spectraqlora_pipelines.dags.placement import Placement


def _compiled(values: str, folder: Path) -> list[dict[str, Any]]:
    """Pipeline and platform spec of one task of quantize-load under these values."""
    (folder / "values.yaml").write_text(values)
    place = Placement(values=read_values(folder / "values.yaml"))

    @dsl.pipeline(name="one-step")
    def pipeline() -> None:
        place(quantize_load(base_model="sample", content="", model_settings={}), "quantize-load")

    compiler.Compiler().compile(pipeline, str(folder / "pipeline.yaml"))
    return list(yaml.safe_load_all((folder / "pipeline.yaml").read_text()))


def _environment(values: str, folder: Path) -> dict[str, str]:
    """The environment of a task of quantize-load under these values."""
    compiled = _compiled(values, folder)[0]
    container = compiled["deploymentSpec"]["executors"]["exec-quantize-load"]["container"]
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("{request: 3, limit: 8}", "3"),
        ("{limit: 8}", "8"),
        ("{request: 2500m}", "2"),
        ("{request: 200m, limit: 2}", "1"),
    ],
)
def test_a_step_is_promised_its_request_else_its_limit_in_whole_cores(
    cpu: str, expected: str, tmp_path: Path
) -> None:
    values = f"defaults: {{cpu: {cpu}}}"
    assert _environment(values, tmp_path) == {"SPECTRAQLORA_CPUS": expected}


def test_a_step_without_cpu_values_is_promised_nothing(tmp_path: Path) -> None:
    assert _environment("defaults: {memory: {limit: 2Gi}}", tmp_path) == {}


def test_an_own_variable_wins_over_the_promise(tmp_path: Path) -> None:
    values = 'defaults: {cpu: {limit: 8}, env: {SPECTRAQLORA_CPUS: "5"}}'
    assert _environment(values, tmp_path) == {"SPECTRAQLORA_CPUS": "5"}


def _platform(values: str, folder: Path) -> dict[str, Any]:
    """What KFP's driver reads of that task's pod, as its own message has it."""
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2

    given = _compiled(values, folder)[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    config: dict[str, Any] = given["exec-quantize-load"]
    json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    return config


def test_files_of_config_maps_and_secrets_are_mounted_and_a_private_authority_is_found(
    tmp_path: Path,
) -> None:
    values = """
defaults:
  config_maps: [{name: company-ca, mount: /etc/company}, {name: both, mount: /etc/both, env: {A: a}}]
  secrets: [{name: netrc, mount: /etc/netrc, optional: true}]
  env: {AWS_CA_BUNDLE: /etc/company/ca.crt}
"""
    config = _platform(values, tmp_path)
    maps = [(m["configMapName"], m["mountPath"], m["optional"]) for m in config["configMapAsVolume"]]
    assert maps == [("company-ca", "/etc/company", False), ("both", "/etc/both", False)]
    assert [m["configMapName"] for m in config["configMapAsEnv"]] == ["both"]
    (secret,) = config["secretAsVolume"]
    assert (secret["secretName"], secret["mountPath"], secret["optional"]) == ("netrc", "/etc/netrc", True)
    assert "secretAsEnv" not in config
    assert _environment(values, tmp_path)["AWS_CA_BUNDLE"] == "/etc/company/ca.crt"


def test_nodes_are_asked_for_or_preferred(tmp_path: Path) -> None:
    values = """
defaults:
  affinity:
    - rules: [{key: zone, values: [a, b]}, {key: gpu, operator: Exists}]
    - {weight: 50, rules: [{key: cores, operator: Gt, values: [7]}]}
"""
    asked, preferred = _platform(values, tmp_path)["nodeAffinity"]
    assert "weight" not in asked and preferred["weight"] == 50
    assert asked["matchExpressions"] == [
        {"key": "zone", "operator": "In", "values": ["a", "b"]},
        {"key": "gpu", "operator": "Exists"},
    ]
    assert preferred["matchExpressions"] == [{"key": "cores", "operator": "Gt", "values": ["7"]}]


def test_a_step_may_have_a_volume_of_its_own(tmp_path: Path) -> None:
    (volume,) = _platform("defaults: {scratch: {size: 200Gi}}", tmp_path)["genericEphemeralVolume"]
    assert volume["size"] == "200Gi" and volume["mountPath"] == "/tmp" and volume["defaultStorageClass"]
    values = "defaults: {scratch: {size: 1Gi, path: /scratch, storage_class: nvme}}"
    (volume,) = _platform(values, tmp_path)["genericEphemeralVolume"]
    assert (volume["mountPath"], volume["storageClassName"]) == ("/scratch", "nvme")


def test_copies_from_hub_and_object_storage_are_in_the_cache_claim(tmp_path: Path) -> None:
    from spectraqlora.runtime.cache import cache_folder

    environment = _environment("defaults: {cache: {claim: shared, path: /hub}}", tmp_path)
    assert environment == {"HF_HOME": "/hub/huggingface", "XDG_CACHE_HOME": "/hub/cache"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
        assert cache_folder().is_relative_to("/hub")
    own = "defaults: {cache: {claim: shared}, env: {XDG_CACHE_HOME: /tmp/own}}"
    assert _environment(own, tmp_path)["XDG_CACHE_HOME"] == "/tmp/own"
