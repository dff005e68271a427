"""The DAG compiled for a cluster: golden files, KFP's own schema, KFP's loader, and a run of the same file."""

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp import components
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec import pipeline_spec_pb2
from spectraqlora_pipelines.cluster.values import NEVER_CACHED

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
CLI = [sys.executable, "-m", "spectraqlora_pipelines.cli"]
BRANCH = ("select-layers", "train", "re-evaluate")
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "s3cr3t-0f-s3",
    "HF_TOKEN": "hf_s3cr3t",
    "MLFLOW_TRACKING_PASSWORD": "s3cr3t-0f-mlflow",
    "KFP_TOKEN": "s3cr3t-0f-kfp",
}


def compile_for(values: str, output: Path, methods: str = "hybrid") -> Path:
    subprocess.run(
        [*CLI, "compile", "--target", "kubernetes", "--values", str(GOLDEN / values), "--methods", methods,
         "--output", str(output)],
        check=True, capture_output=True, env={**os.environ, **SECRETS},
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for("values-full.yaml", tmp_path_factory.mktemp("compiled") / "full.yaml")


def without_version(text: str) -> list[str]:
    """Lines but for the one that a patch release of KFP changes."""
    return [line for line in text.splitlines() if not line.startswith("sdkVersion:")]


@pytest.mark.parametrize("name", ["minimal", "full"])
def test_the_compiled_pipeline_is_the_golden_file(name: str, tmp_path: Path) -> None:
    compiled = compile_for(f"values-{name}.yaml", tmp_path / "pipeline.yaml").read_text()
    golden = (GOLDEN / f"pipeline-{name}.yaml").read_text()
    changes = list(
        difflib.unified_diff(
            without_version(golden), without_version(compiled), "golden", "compiled", lineterm="", n=1
        )
    )
    assert not changes, "\n".join(["look at the changes, then: make golden", *changes[:60]])


def test_kfps_own_schema_knows_every_field(full: Path) -> None:
    pipeline, platform = yaml.safe_load_all(full.read_text())
    # ParseDict raises on any unknown field or wrong type.
    spec = json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == "spectraqlora-ablation"
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert kubernetes.keys() == pipeline["deploymentSpec"]["executors"].keys()
    for executor in kubernetes.values():
        json_format.ParseDict(executor, KubernetesExecutorConfig())
    deployment = json_format.ParseDict(
        pipeline["deploymentSpec"], pipeline_spec_pb2.PipelineDeploymentConfig()
    )
    train = deployment.executors["exec-train"].container
    assert train.image == "registry.example.com/ml/spectraqlora/train@sha256:" + "0123456789abcdef" * 4
    assert train.resources.accelerator.resource_type == "nvidia.com/gpu"
    assert train.resources.accelerator.resource_count == "2"


def test_the_sdk_loads_it_back_with_its_parameters_and_platform(full: Path) -> None:
    loaded = components.load_component_from_file(str(full))
    assert {"base_model", "seed", "select", "train", "tracking"} <= loaded.component_spec.inputs.keys()
    executors = loaded.platform_spec.platforms["kubernetes"].deployment_spec.executors
    assert executors["exec-train"]["emptyDirMounts"][0]["mountPath"] == "/dev/shm"


def test_every_step_is_placed_as_its_values_say(full: Path) -> None:
    pipeline, platform = yaml.safe_load_all(full.read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for label, executor in executors.items():
        assert executor["pvcMount"][0] | {"pvcNameParameter": None} == {
            "constant": "hub-cache", "mountPath": "/hub", "subPath": "team", "pvcNameParameter": None,
        }  # fmt: skip
        assert executor["securityContext"] == {"runAsUser": "10001", "runAsGroup": "0", "runAsNonRoot": True}
        assert executor["imagePullSecret"][0]["secretName"] == "registry-credentials"
        own = {"team": "nlp", "spectraqlora/step": re.sub(r"-\d+$", "", label.removeprefix("exec-"))}
        branch = {"spectraqlora/method": "hybrid"} if own["spectraqlora/step"] in BRANCH else {}
        assert executor["podMetadata"]["labels"] == own | branch
    assert executors["exec-train"]["activeDeadlineSeconds"] == "86400"
    assert executors["exec-compare"]["activeDeadlineSeconds"] == "7200"
    assert "emptyDirMounts" not in executors["exec-compare"]

    tasks = dict(pipeline["root"]["dag"]["tasks"])
    for group in ("exit-handler-1", "branch-hybrid"):
        tasks |= pipeline["components"][f"comp-{group}"]["dag"]["tasks"]
    steps = {n: t for n, t in tasks.items() if not n.startswith(("branch", "exit-handler"))}
    cached = {name for name, task in steps.items() if task["cachingOptions"].get("enableCache")}
    assert cached == steps.keys() - {"register", "promote", "snr-analyze", "close-runs"}
    assert steps["train"]["retryPolicy"] == {
        "maxRetryCount": 6, "backoffDuration": "60s", "backoffFactor": 1.5, "backoffMaxDuration": "172800s",
    }  # fmt: skip
    assert "retryPolicy" not in steps["snr-analyze"]
    for executor in pipeline["deploymentSpec"]["executors"].values():
        assert {"name": "HF_HOME", "value": "/hub/huggingface"} in executor["container"]["env"]


def test_no_secret_of_the_environment_stands_in_the_yaml(full: Path) -> None:
    text = full.read_text()
    assert not [name for name, value in SECRETS.items() if value in text]
    assert "secretName: s3-credentials" in text and "envVar: AWS_SECRET_ACCESS_KEY" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "mars"], "--target"),
        (["--target", "kubernetes"], "--values"),
        (["--values", str(GOLDEN / "values-full.yaml")], "--target kubernetes"),
        (["--target", "kubernetes", "--values", "none.yaml"], "none.yaml"),
    ],
)
def test_a_bad_command_is_refused_in_one_line_and_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.yaml"
    refused = subprocess.run(
        [*CLI, "compile", "--output", str(output), *arguments], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and not output.exists()
    assert (
        refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1 and words in refused.stderr
    )


def test_submit_and_schedule_take_images_and_the_runs_account_from_the_values_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectraqlora_pipelines.cli import app
    from typer.testing import CliRunner

    from tests.kfp_server import KfpServer

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text(
        "{model: {base_model: owner/model}, data: {source: owner/data}, tracking: {uri: 'http://mlflow:5000'}}"
    )
    with KfpServer() as server:
        shared = ["--host", server.endpoint, "--config", str(tmp_path / "settings.yaml"),
                  "--values", str(GOLDEN / "values-full.yaml")]  # fmt: skip
        for command in (["submit"], ["schedule", "create", "nightly", "--cron", "0 3 * * *"]):
            done = CliRunner().invoke(app.app, [*command, *shared])
            assert done.exit_code == 0, (done.output, done.exception)
        (run,) = server.state.runs.values()
        (recurring,) = server.state.recurring.values()
        for started in (run, recurring):
            assert started["service_account"] == "spectraqlora"
            assert started["runtime_config"]["pipeline_root"] == "s3://bucket/pipelines"
        assert [e["display_name"] for e in server.state.experiments.values()] == ["nightly"]
        uploaded = [json.dumps(version) for version in server.state.versions.values()]
        assert len(uploaded) == 2
        refused = CliRunner().invoke(
            app.app, ["submit", *shared, "--package", str(GOLDEN / "pipeline-full.yaml")]
        )
        assert "--values" in str(refused.exception)
        assert server.problems == []


@pytest.mark.parametrize("pipeline", ["ablation", "retraining"])
def test_both_dags_place_every_step_on_a_cluster(pipeline: str, tmp_path: Path) -> None:
    subprocess.run(
        [*CLI, "compile", "--pipeline", pipeline, "--target", "kubernetes", "--values",
         str(GOLDEN / "values-full.yaml"), "--set", "retrain.start=champion", "--output", str(tmp_path / "p.yaml")],
        check=True, capture_output=True,
    )  # fmt: skip
    spec, platform = yaml.safe_load_all((tmp_path / "p.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors.keys() == spec["deploymentSpec"]["executors"].keys()
    for executor in spec["deploymentSpec"]["executors"].values():
        assert executor["container"]["image"].startswith("registry.example.com/ml/spectraqlora/")
    dags = [spec["root"], *spec["components"].values()]
    tasks = [t for dag in dags if "dag" in dag for t in dag["dag"]["tasks"].values()]
    uncached = {
        t["componentRef"]["name"].removeprefix("comp-")
        for t in tasks
        if "cachingOptions" in t and not t["cachingOptions"].get("enableCache")
    }
    looking = {"detect-changes", "start-point"} if pipeline == "retraining" else set()
    assert uncached & NEVER_CACHED == {"register", "promote", "close-runs"} | looking
    assert platform["platforms"]["kubernetes"]["pipelineConfig"]["activeDeadlineSeconds"] == 172800


@pytest.mark.e2e
def test_the_very_same_file_runs_on_this_machine(
    full: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    from spectraqlora.settings import parse

    small = {
        "model": {"base_model": str(tiny_model)},
        "data": {"source": str(tiny_rows)},
        "select": {"rank": 4},
        "train": {"max_steps": 2, "evaluations": 1},
        "evaluate": {"accuracy_rows": 0},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    sections = {
        name: section
        for name, section in parse(small).model_dump(mode="json").items()
        if isinstance(section, dict)
    }
    loaded = components.load_component_from_file(str(full))
    arguments = {name: value for name, value in sections.items() if name in loaded.component_spec.inputs}
    arguments |= {"base_model": str(tiny_model), "source": str(tiny_rows), "seed": 1}
    probe = f"""
import json
from kfp import components, local
local.init(local.SubprocessRunner(use_venv=False), pipeline_root={str(tmp_path / "root")!r})
components.load_component_from_file({str(full)!r})(**json.loads({json.dumps(arguments)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", probe], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    registered = next((tmp_path / "root").rglob("registered.json"))
    assert json.loads(registered.read_text())["version"] == 1
    assert next((tmp_path / "root").rglob("merged/model.safetensors")).stat().st_size > 0
