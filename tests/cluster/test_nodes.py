"""Training on several machines, on a real cluster with Kubeflow Trainer: TrainJobs as Argo's train step makes them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kubernetes import client
from kubernetes.client import ApiException
from spectraqlora.artifacts import TrainingLog
from spectraqlora.models import adapters
from spectraqlora.settings import Settings, parse
from spectraqlora.steps.train.train_job import API
from spectraqlora_pipelines.cluster.argo_client import RUN
from spectraqlora_pipelines.cluster.train_job import train_job
from spectraqlora_pipelines.cluster.values import ClusterValues, read_values
from spectraqlora_pipelines.dags.argo import template_for, text
from spectraqlora_pipelines.reference import CHART

from tests.cluster.conftest import GROUP, forget
from tests.cluster.runs import KILL, inside
from tests.cluster.services import BUCKET, S3_SECRET, Store, eventually
from tests.helm import helm
from tests.unit.models.test_adapters import DOWN, Q0, rank_map

pytestmark = pytest.mark.cluster
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RELEASE = "nodes-test"
TEMPLATE = "train-hybrid"
ENDS_WITHIN_S = 400
PREFIX = f"{RELEASE}/{os.getpid()}"
"""What the tests keep in the store is below this."""
INPUTS = f"{PREFIX}/inputs"


@pytest.fixture(scope="module")
def release(namespace: str) -> Iterator[str]:
    """The chart's runtime, account and roles; the name that they have."""
    if program := os.environ.get("SPECTRAQLORA_TEST_CLUSTER"):
        started = subprocess.run([program, "trainer"], check=False, capture_output=True, text=True)
        if started.returncode:
            pytest.skip(f"no Kubeflow Trainer: {(started.stderr.strip() or '-').splitlines()[-1]}")
    try:
        client.CustomObjectsApi().list_namespaced_custom_object(*API, namespace, "trainjobs")
    except ApiException as error:
        pytest.skip(f"no Kubeflow Trainer in the cluster: Kubernetes answered {error.status}")
    given = [
        *("nodes.enabled=true", "hook.enabled=false", f"fullnameOverride={RELEASE}"),
        "pipeline.values.steps.train.image.pull_policy=Never",
    ]
    options = [part for each in given for part in ("--set", each)]
    subprocess.run(
        [helm(), "upgrade", "--install", RELEASE, str(CHART), "--namespace", namespace, *options],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    yield RELEASE
    forget(namespace, RELEASE)
    subprocess.run(
        [helm(), "uninstall", RELEASE, "--namespace", namespace], check=True, stdout=subprocess.DEVNULL
    )


def values_of(release: str, store: Store, folder: Path) -> ClusterValues:
    values = {
        "run": {"service_account": release},
        "nodes": {"runtime": f"{release}-nodes"},
        "defaults": {
            "cpu": {"request": "100m"},
            "env": {"AWS_ENDPOINT_URL": store.inside, "AWS_REGION": "us-east-1", "OMP_NUM_THREADS": "1"},
            "secrets": [
                {
                    "name": S3_SECRET,
                    "env": {"AWS_ACCESS_KEY_ID": "accesskey", "AWS_SECRET_ACCESS_KEY": "secretkey"},
                }
            ],
            "retries": {"attempts": 1, "backoff": "1s"},
        },
        "steps": {"train": {"shm": None}},
    }
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    return read_values(folder / "values.yaml")


class Training:
    """The train step of a branch alone, on inputs that are in the store."""

    def __init__(self, name: str, namespace: str, values: ClusterValues, store: Store, **train: Any) -> None:
        self._name, self._namespace, self._store = f"{RELEASE}-{name}", namespace, store
        self.checkpoints = f"{PREFIX}/{name}"
        self._settings = parse(
            {
                "methods": "hybrid",
                "train": {"nodes": 2, "max_steps": 60, "batch_size": 2, "lora_dropout": 0.2, **train},
                "evaluate": {"batch_size": 2},
                "checkpoint": {
                    "destination": f"s3://{BUCKET}/{self.checkpoints}", "every_steps": 5, "every_minutes": 0,
                },
                "tracking": {"uri": "sqlite:////tmp/mlflow.db"},
            }
        )  # fmt: skip
        self._values = values

    def start(self) -> None:
        template = template_for("ablation", self._settings, self._values)["spec"]
        (step,) = (each for each in template["templates"] if each["name"] == TEMPLATE)
        artifacts = [
            {"name": name, "s3": {"key": f"{INPUTS}/{name}"}, "archive": {"none": {}}}
            for name in ("four_bit", "rows", "rank_map")
        ]
        step["inputs"]["artifacts"] = [
            entry for entry in step["inputs"]["artifacts"] if entry["name"] in {a["name"] for a in artifacts}
        ]
        spec = {
            **{key: template[key] for key in ("serviceAccountName", "artifactGC")},
            "entrypoint": TEMPLATE,
            "templates": [step],
            "arguments": {"parameters": self._parameters(self._settings), "artifacts": artifacts},
        }
        client.CustomObjectsApi().create_namespaced_custom_object(
            *GROUP, self._namespace, "workflows",
            {
                "apiVersion": "/".join(GROUP), "kind": "Workflow",
                "metadata": {"name": self._name, "labels": {RUN: RELEASE}}, "spec": spec,
            },
        )  # fmt: skip

    @staticmethod
    def _parameters(settings: Settings) -> list[dict[str, str]]:
        sections = settings.model_dump(mode="json")
        given = {
            f"{name}_settings": sections[name] for name in ("train", "evaluate", "tracking", "checkpoint")
        }
        return [
            {"name": name, "value": text(value)}
            for name, value in {**given, "round": 1, "rounds": 1, "seed": 1}.items()
        ]

    def workflow(self) -> dict[str, Any]:
        return dict(
            client.CustomObjectsApi().get_namespaced_custom_object(
                *GROUP, self._namespace, "workflows", self._name
            )
        )

    def job(self) -> dict[str, Any] | None:
        """Its TrainJob."""
        uid = self.workflow()["metadata"]["uid"]
        found = client.CustomObjectsApi().list_namespaced_custom_object(*API, self._namespace, "trainjobs")
        return next(
            (job for job in found["items"] if job["metadata"]["ownerReferences"][0]["uid"] == uid), None
        )

    def pods(self) -> list[Any]:
        """Those of its machines, the first one's first."""
        job = self.job()
        if job is None:
            return []
        selector = f"jobset.sigs.k8s.io/jobset-name={job['metadata']['name']}"
        found = client.CoreV1Api().list_namespaced_pod(self._namespace, label_selector=selector).items
        return sorted(found, key=lambda pod: pod.metadata.labels["batch.kubernetes.io/job-completion-index"])

    def has_checkpoint(self) -> bool:
        """Whether it can be resumed."""
        keys = self._store.keys(self.checkpoints)
        return any(key.endswith("_manifest.json") and "/step-" in key for key in keys)

    def phase(self) -> str:
        """Succeeded, Failed or Error when it has ended."""
        phase = self.workflow().get("status", {}).get("phase", "")
        return phase if phase in ("Succeeded", "Failed", "Error") else ""

    def log(self) -> str:
        """What the waiting step has printed."""
        pod = self.waiting().metadata.name
        return str(client.CoreV1Api().read_namespaced_pod_log(pod, self._namespace, container="main"))

    def waiting(self) -> Any:
        """The newest pod of the step itself."""
        found = client.CoreV1Api().list_namespaced_pod(
            self._namespace, label_selector=f"workflows.argoproj.io/workflow={self._name}"
        )  # fmt: skip
        return max(found.items, key=lambda pod: pod.metadata.creation_timestamp)

    def end_waiting(self) -> None:
        """Delete the step's pod as a drain does: the step is told, and has time to end."""
        client.CoreV1Api().delete_namespaced_pod(self.waiting().metadata.name, self._namespace)

    def kill_waiting(self) -> None:
        """Kill the step's process as a lost node does: it is told nothing."""
        inside(self._namespace, self.waiting(), KILL)

    def attempts(self) -> list[dict[str, Any]]:
        """Argo's nodes of the step's pods, oldest first."""
        nodes = [n for n in self.workflow()["status"]["nodes"].values() if n["type"] == "Pod"]
        return sorted(nodes, key=lambda node: str(node["startedAt"]))

    def adapter(self, folder: Path) -> Path:
        """What it made, when it has ended."""
        assert eventually(self.phase, ENDS_WITHIN_S, every=1) == "Succeeded", self.log()
        node = self.attempts()[-1]
        (made,) = (a for a in node["outputs"]["artifacts"] if a["name"] == "adapter")
        return self._store.get(made["s3"]["key"], folder / self._name)

    def remove(self) -> None:
        """Delete its run where there is one, and with it its job."""
        try:
            client.CustomObjectsApi().delete_namespaced_custom_object(
                *GROUP, self._namespace, "workflows", self._name
            )
        except ApiException as error:
            assert error.status == 404, error


@pytest.fixture(scope="module")
def values(release: str, store: Store, tmp_path_factory: pytest.TempPathFactory) -> ClusterValues:
    return values_of(release, store, tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="module")
def inputs(
    store: Store, quantized: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    ranks = tmp_path_factory.mktemp("ranks")
    rank_map(quantized, {Q0: 4, DOWN: 4}).write(ranks)
    for name, folder in {"four_bit": quantized, "rows": prepared, "rank_map": ranks}.items():
        store.put(folder, f"{INPUTS}/{name}")
    yield
    store.remove(PREFIX)


@pytest.mark.usefixtures("release")
def test_the_api_server_takes_the_job_by_trainers_full_schema(namespace: str) -> None:
    job = json.loads(train_job(read_values(GOLDEN / "values-full.yaml")))
    job["metadata"]["name"] = "check"
    job["spec"]["runtimeRef"]["name"] = f"{RELEASE}-nodes"
    job["spec"]["trainer"] |= {"numNodes": 2, "numProcPerNode": 2, "args": ["s3://bucket/x", "{}"]}

    def check(job: dict[str, Any]) -> None:
        client.CustomObjectsApi().create_namespaced_custom_object(
            *API, namespace, "trainjobs", job, dry_run="All", field_validation="Strict"
        )

    check(job)
    wrong = copy.deepcopy(job)
    wrong["spec"]["trainer"]["numberOfNodes"] = 2
    with pytest.raises(ApiException) as refused:
        check(wrong)
    assert "spec.trainer.numberOfNodes" in refused.value.body


@pytest.mark.usefixtures("release")
def test_the_api_server_takes_the_charts_runtime_by_trainers_full_schema(namespace: str) -> None:
    given = ["nodes.enabled=true", "hook.enabled=false", f"fullnameOverride={RELEASE}-check"]
    options = [part for each in given for part in ("--set", each)]
    only = ["--show-only", "templates/nodes.yaml"]
    done = subprocess.run(
        [helm(), "template", RELEASE, str(CHART), *options, *only], check=True, capture_output=True, text=True
    )
    (runtime,) = (each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "TrainingRuntime")
    client.CustomObjectsApi().create_namespaced_custom_object(
        *API, namespace, "trainingruntimes", runtime, dry_run="All", field_validation="Strict"
    )


@pytest.mark.usefixtures("inputs")
def test_a_machine_or_the_step_that_is_lost_costs_no_number(
    namespace: str, values: ClusterValues, store: Store, tmp_path: Path
) -> None:
    struck, left = (Training(name, namespace, values, store) for name in ("struck", "left"))
    struck.start()
    try:
        eventually(struck.has_checkpoint, ENDS_WITHIN_S)
        first, second = struck.pods()
        assert first.spec.node_name and second.metadata.labels["spectraqlora/step"] == "train"
        assert first.spec.containers[0].image_pull_policy == "Never", "as the chart's values say"
        client.CoreV1Api().delete_namespaced_pod(second.metadata.name, namespace, grace_period_seconds=0)
        resumed = struck.adapter(tmp_path)
        assert "resuming from the checkpoint of step" in struck.log()
        # The step's own pod is lost here, and the machines never hear of it.
        left.start()
        eventually(lambda: [pod for pod in left.pods() if pod.status.phase == "Running"], ENDS_WITHIN_S)
        left.kill_waiting()
        uninterrupted = left.adapter(tmp_path)
        assert "is there from an earlier attempt" in left.log() and "resuming" not in left.log()
        assert len(left.attempts()) == 2
        weights = [adapters.read_adapter_weights(folder) for folder in (resumed, uninterrupted)]
        assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
        logs = [TrainingLog.read(folder) for folder in (resumed, uninterrupted)]
        assert logs[0].loss_curve == logs[1].loss_curve and logs[0].processes == 2
        # The inputs that were handed over are gone; the adapter and checkpoints stay.
        handed = [
            key.split("/nodes/train-")[1].split("/")[1] for key in store.keys(f"{struck.checkpoints}/nodes")
        ]
        assert set(handed) == {"adapter"}
    finally:
        for training in (struck, left):
            training.remove()


@pytest.mark.usefixtures("inputs")
def test_a_waiting_step_that_is_told_to_end_deletes_its_job_and_the_next_one_resumes(
    namespace: str, values: ClusterValues, store: Store, tmp_path: Path
) -> None:
    told = Training("told", namespace, values, store)
    told.start()
    try:
        eventually(told.has_checkpoint, ENDS_WITHIN_S)
        job = told.job()
        assert job is not None
        began = time.monotonic()
        told.end_waiting()
        eventually(
            lambda: (told.job() or {"metadata": {}})["metadata"].get("uid") != job["metadata"]["uid"], 60
        )
        print(f"its job was deleted after {time.monotonic() - began:.0f} s")
        told.adapter(tmp_path)
        print(f"the next one trained to the end after {time.monotonic() - began:.0f} s")
        log = told.log()
        assert "created TrainJob" in log and "resuming from the checkpoint of step" in log
        assert len(told.attempts()) == 2
    finally:
        told.remove()


@pytest.mark.usefixtures("inputs")
def test_what_a_machine_refuses_ends_the_step_with_its_line(
    namespace: str, values: ClusterValues, store: Store
) -> None:
    refused = Training("refused", namespace, values, store, optimizer="adamw_8bit")
    refused.start()
    try:
        assert eventually(refused.phase, ENDS_WITHIN_S, every=1) == "Failed"
        assert "error: train.optimizer: 'adamw_8bit'" in refused.log()
        (node,) = refused.attempts()
        assert node["outputs"]["exitCode"] == "2"
    finally:
        refused.remove()
