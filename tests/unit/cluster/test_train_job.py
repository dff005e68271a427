"""A training on several machines: what its TrainJob gets of the values file, and what its waiting step does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from spectraqlora.errors import InputError
from spectraqlora.places import base_place
from spectraqlora.settings import TrainSettings, parse
from spectraqlora.steps.train.on_nodes import _job, _processes, train_on_nodes
from spectraqlora.steps.train.request import Inputs, TrainRequest
from spectraqlora.steps.train.train_job import POD, TEMPLATE, obstacle
from spectraqlora_pipelines.cluster.train_job import train_job
from spectraqlora_pipelines.cluster.values import ClusterValues, read_values
from spectraqlora_pipelines.dags.argo import template_for
from spectraqlora_pipelines.dags.catalogue import cluster_arguments, compile_dag, recipe
from spectraqlora_pipelines.local.preflight import check

VALUES = """
run: {service_account: steps}
nodes: {queue: gpus, runtime: team-nodes}
defaults:
  cpu: {request: 1, limit: 2}
  env: {GREETING: "{{workflow.name}}"}
  tolerations: [{key: everywhere, operator: Exists}]
steps:
  train:
    gpu: {count: 4}
    memory: {request: 64Gi}
    shm: 8Gi
    time_limit: 2d
    node_selector: {accelerator: h100}
    tolerations: [{key: nvidia.com/gpu, operator: Exists}]
    annotations: {team: nlp}
"""
SETTINGS = {"methods": "hybrid", "train": {"nodes": 2}}


@pytest.fixture
def values(tmp_path: Path) -> ClusterValues:
    (tmp_path / "values.yaml").write_text(VALUES)
    return read_values(tmp_path / "values.yaml")


def of_argo(values: ClusterValues, nodes: int) -> dict[str, Any]:
    """The train step's template."""
    document = template_for("ablation", parse({**SETTINGS, "train": {"nodes": nodes}}), values)
    return next(each for each in document["spec"]["templates"] if each["name"] == "train-hybrid")


def of_kfp(values: ClusterValues | None, nodes: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Container and platform's part of the compiled train step."""
    path = folder / "pipeline.yaml"
    compile_dag(path, "ablation", parse({**SETTINGS, "train": {"nodes": nodes}}), values)
    pipeline, platform = yaml.safe_load_all(path.read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return pipeline["deploymentSpec"]["executors"]["exec-train"]["container"], executors["exec-train"]


def plain(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in entries if "value" in entry}


def test_gpus_and_tolerations_go_to_the_jobs_pods_and_not_to_the_step_that_waits(
    values: ClusterValues, tmp_path: Path
) -> None:
    alone, waits = of_argo(values, 1), of_argo(values, 2)
    assert alone["container"]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert alone["activeDeadlineSeconds"] == 2 * 86400
    assert "nvidia.com/gpu" not in str(waits["container"]["resources"])
    assert waits["tolerations"] == [{"key": "everywhere", "operator": "Exists"}]
    # A queue has no limit.
    assert "nodeSelector" not in waits and "activeDeadlineSeconds" not in waits
    assert "/dev/shm" not in str(waits["container"]["volumeMounts"])
    given = waits["container"]["env"]
    assert {"name": POD, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in given

    job = json.loads(plain(given)[TEMPLATE])
    spec = job["spec"]
    assert spec["runtimeRef"]["name"] == "team-nodes" and spec["activeDeadlineSeconds"] == 2 * 86400
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "4"
    (patch,) = spec["runtimePatches"]
    (jobs,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = jobs["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false", "team": "nlp"}
    assert pod["spec"]["nodeSelector"] == {"accelerator": "h100"}
    assert pod["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert pod["spec"]["serviceAccountName"] == "steps"
    assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True

    container, platform = of_kfp(values, 2, tmp_path)
    assert "accelerator" not in str(container["resources"])
    assert json.loads(plain(container["env"])[TEMPLATE]) == job
    assert {"name": POD, "fieldPath": "metadata.name"} in platform["fieldPathAsEnv"]
    assert "nodeSelector" not in platform and "activeDeadlineSeconds" not in platform


def test_argo_takes_nothing_in_the_job_for_its_own(values: ClusterValues) -> None:
    written = train_job(values)
    assert "{{" not in written
    environment = plain(json.loads(written)["spec"]["trainer"]["env"])
    assert environment["GREETING"] == "{{workflow.name}}"


def test_one_machine_and_a_cluster_without_values_are_compiled_as_ever(
    values: ClusterValues, tmp_path: Path
) -> None:
    assert TEMPLATE not in str(of_argo(values, 1)) + str(of_kfp(values, 1, tmp_path))
    container, _ = of_kfp(None, 1, tmp_path)
    assert "env" not in container
    container, _ = of_kfp(None, 2, tmp_path)
    assert json.loads(plain(container["env"])[TEMPLATE])["spec"]["runtimeRef"]["name"] == "spectraqlora-nodes"


def test_what_several_machines_need_is_said_in_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = parse(
        {
            **SETTINGS,
            "model": {"base_model": "a/b"},
            "data": {"source": "c/d"},
            "tracking": {"uri": "http://m"},
        }
    )
    with pytest.raises(InputError, match=r"train\.nodes: '2': expected 1 on this machine.*submit"):
        check(settings, base_place(str(tiny_model), "", False), [])
    with pytest.raises(
        InputError, match=r"checkpoint\.destination: '': expected an s3:// address.*train\.nodes=2"
    ):
        cluster_arguments("ablation", settings, None)
    monkeypatch.delenv(TEMPLATE, raising=False)
    request = TrainRequest(Inputs(tmp_path, tmp_path, tmp_path), tmp_path, 1, train=settings.train)
    with pytest.raises(InputError, match=r"train\.nodes: '2': expected 1, or a pipeline that was compiled"):
        train_on_nodes(request)
    # A model that was made by one machine is not made again by two.
    assert recipe(settings) == recipe(parse({**settings.model_dump(), "train": {"nodes": 1}}))


def pod_with(condition: dict[str, Any] | None = None, state: dict[str, Any] | None = None) -> client.V1Pod:
    conditions = [client.V1PodCondition(**condition)] if condition else None
    status = client.V1ContainerStatus(
        name="node", image="i", image_id="", ready=False, restart_count=0,
        state=client.V1ContainerState(waiting=client.V1ContainerStateWaiting(**state)) if state else None,
    )  # fmt: skip
    return client.V1Pod(status=client.V1PodStatus(conditions=conditions, container_statuses=[status]))


@pytest.mark.parametrize(
    ("condition", "state", "expected"),
    [
        (None, None, ""),
        ({"type": "PodScheduled", "status": "True"}, {"reason": "ContainerCreating"}, ""),
        (
            {"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available: 2 Insufficient cpu."},
            None,
            "0/2 nodes are available: 2 Insufficient cpu.",
        ),
        (
            {"type": "PodScheduled", "status": "True"},
            {"reason": "ErrImagePull", "message": "no such image"},
            "ErrImagePull: no such image",
        ),
        (None, {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'},
         'CreateContainerConfigError: secret "s" not found'),
    ],
)  # fmt: skip
def test_what_keeps_a_machine_from_starting_is_said(
    condition: dict[str, Any] | None, state: dict[str, Any] | None, expected: str
) -> None:
    assert obstacle(pod_with(condition, state)) == expected


def test_each_machine_has_a_process_per_gpu(values: ClusterValues) -> None:
    with_gpus, without = json.loads(train_job(values)), json.loads(train_job(ClusterValues()))
    assert [_processes(TrainSettings(), job) for job in (with_gpus, without)] == [4, 1]
    assert [_processes(TrainSettings(processes=2), job) for job in (with_gpus, without)] == [2, 2]
    with pytest.raises(
        InputError, match=r"train\.processes: '5': expected at most 4, the GPUs of each machine"
    ):
        _processes(TrainSettings(processes=5), with_gpus)


def test_the_request_reaches_the_machines_as_it_is(values: ClusterValues, tmp_path: Path) -> None:
    request = TrainRequest(
        Inputs(tmp_path, tmp_path, tmp_path),
        tmp_path,
        1,
        train=TrainSettings(nodes=3),
        run_key="$(HOME) {{x}}",
    )
    trainer = _job(json.loads(train_job(values)), request, 4, "s3://bucket/x")["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 4)
    address, text = trainer["args"]
    assert address == "s3://bucket/x" and "$" not in text
    assert TrainRequest.parse(text) == request
