"""What a cluster's values file gives to a placed task."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl
from spectraqlora.settings import parse
from spectraqlora.steps.quantize_load.component import quantize_load
from spectraqlora_pipelines.cluster.values import read_values
from spectraqlora_pipelines.dags.catalogue import compile_dag
from spectraqlora_pipelines.dags.placement import Placement

from tests.unit.compiled_dag import Compiled


def _placed(place: Placement, folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A task of quantize-load, its container and what Kubernetes is told of it."""

    @dsl.pipeline(name="one-step")
    def pipeline() -> None:
        task = quantize_load(base_model="sample", content="", model_settings={})
        place(task, "quantize-load")

    compiler.Compiler().compile(pipeline, str(folder / "pipeline.yaml"))
    compiled, platform = yaml.safe_load_all((folder / "pipeline.yaml").read_text())
    container = compiled["deploymentSpec"]["executors"]["exec-quantize-load"]["container"]
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return compiled["root"]["dag"]["tasks"]["quantize-load"], container, executors["exec-quantize-load"]


def _values(text: str, folder: Path) -> Placement:
    (folder / "values.yaml").write_text(text)
    return Placement(values=read_values(folder / "values.yaml"))


def _environment(values: str, folder: Path) -> dict[str, str]:
    """The environment of a task of quantize-load under these values, without the name of its image."""
    _, container, _ = _placed(_values(values, folder), folder)
    entries = {entry["name"]: entry["value"] for entry in container.get("env", [])}
    assert entries.pop("SPECTRAQLORA_IMAGE_REFERENCE") == container["image"]
    return entries


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

    _, _, config = _placed(_values(values, folder), folder)
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


@pytest.mark.parametrize("values", ["", "defaults: {labels: {team: nlp}}"])
def test_a_pod_is_labelled_with_its_step(values: str, tmp_path: Path) -> None:
    _, _, kubernetes = _placed(_values(values, tmp_path), tmp_path)
    own = {"spectraqlora/step": "quantize-load"}
    assert kubernetes["podMetadata"]["labels"] == own | ({"team": "nlp"} if values else {})


def test_a_step_knows_the_image_that_really_runs(tmp_path: Path) -> None:
    values = "{defaults: {image: {registry: me.example, tag: 9-cuda}}, steps: {train: {image: {tag: other}}}}"
    _, container, _ = _placed(_values(values, tmp_path), tmp_path)
    assert {
        "name": "SPECTRAQLORA_IMAGE_REFERENCE",
        "value": "me.example/spectraqlora/quantize-load:9-cuda",
    } in container["env"]


@pytest.mark.parametrize(
    ("values", "window", "limit"),
    [
        # Three attempts of 12 hours, and waits of 30 and 60 seconds.
        ("", 3 * 43200 + 90, "43200"),
        (
            "defaults: {time_limit: 10m, retries: {attempts: 4, backoff: 10s, factor: 3}}",
            5 * 600 + 400,
            "600",
        ),
        ("defaults: {time_limit: 10m, retries: {attempts: 4, max_backoff: 2h}}", 7200, "600"),
        ("defaults: {time_limit: null}", 10 * 365 * 86400, None),
    ],
)
def test_all_attempts_fit_into_the_window_unless_another_is_given(
    values: str, window: int, limit: str | None, tmp_path: Path
) -> None:
    task, _, kubernetes = _placed(_values(values, tmp_path), tmp_path)
    assert task["retryPolicy"]["backoffMaxDuration"] == f"{window}s"
    assert kubernetes.get("activeDeadlineSeconds") == limit


def test_without_a_values_file_a_cluster_has_the_same_limits_and_this_machine_none(tmp_path: Path) -> None:
    task, _, kubernetes = _placed(Placement(), tmp_path)
    assert task["retryPolicy"]["backoffMaxDuration"] == f"{3 * 43200 + 90}s"
    assert kubernetes["activeDeadlineSeconds"] == "43200"
    task, _, kubernetes = _placed(Placement(retries=0), tmp_path)
    assert "retryPolicy" not in task and "activeDeadlineSeconds" not in kubernetes


@pytest.mark.parametrize("order", ["qlora,hybrid,alors,sgm", "sgm,alors,hybrid,qlora"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_pod_of_a_branch_is_labelled_with_its_own_method(
    order: str, rounds: int, tmp_path: Path
) -> None:
    path = tmp_path / "pipeline.yaml"
    compile_dag(path, "ablation", parse({"methods": order, "rounds": rounds}))
    document, platform = yaml.safe_load_all(path.read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for task in Compiled(document).tasks():
        component = document["components"][task.document["componentRef"]["name"]]
        labels = executors[component["executorLabel"]]["podMetadata"]["labels"]
        method = re.search(r"\((\w+)", task.name)
        own = {"spectraqlora/step": task.step} | ({"spectraqlora/method": method[1]} if method else {})
        assert labels == own, task.name


def test_a_step_knows_where_people_reach_the_ui_so_that_its_mlflow_run_can_lead_there(tmp_path: Path) -> None:
    ui = "https://kubeflow.example.com/pipeline"
    assert _environment(f"run: {{ui: '{ui}'}}", tmp_path)["SPECTRAQLORA_KFP_UI"] == ui
    own = f"{{run: {{ui: '{ui}'}}, defaults: {{env: {{SPECTRAQLORA_KFP_UI: 'https://other'}}}}}}"
    assert _environment(own, tmp_path)["SPECTRAQLORA_KFP_UI"] == "https://other"
    assert "SPECTRAQLORA_KFP_UI" not in _environment("", tmp_path)
