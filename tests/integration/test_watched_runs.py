"""status, logs and submit --watch: what Kubeflow Pipelines and Kubernetes tell of a run, for people without a UI."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.errors import InputError
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.cli import submit as submitting
from spectraqlora_pipelines.cluster.pods import Pods
from spectraqlora_pipelines.local.run import StepFailed
from typer.testing import CliRunner, Result

from tests.argo import Workflow
from tests.kfp_server import KfpServer
from tests.kubernetes_server import RECORDED, KubernetesServer, pod

SETTINGS = """
methods: hybrid
model: {base_model: /models/base}
data: {source: /data/rows.jsonl}
tracking: {uri: "http://mlflow:5000"}
"""
Command = Callable[..., Result]
TRAIN = "exit-handler-1.branch-hybrid.train"


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running
    assert running.problems == []


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KubernetesServer]:
    with KubernetesServer(tmp_path) as running:
        yield running


@pytest.fixture
def command(
    server: KfpServer, cluster: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    for name, value in {
        "HOME": str(tmp_path),
        "COLUMNS": "300",
        "SPECTRAQLORA_KFP_HOST": server.endpoint,
        "SPECTRAQLORA_CONFIG": str(tmp_path / "settings.yaml"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    monkeypatch.setattr(submitting, "POLL_SECONDS", 0.01)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app.app, list(arguments))

    return run


def submitted(command: Command, server: KfpServer) -> tuple[str, Workflow]:
    """A run, its workflow at the beginning."""
    done = command("submit", "--name", "mine")
    assert done.exit_code == 0, (done.output, done.exception)
    (run_id,) = server.state.runs
    (version,) = server.state.versions.values()
    return run_id, begun(version["pipeline_spec"], run_id)


def begun(pipeline: dict[str, Any], run_id: str) -> Workflow:
    """A workflow that has come to the training of hybrid."""
    workflow = Workflow(pipeline, run_id)
    workflow.group("exit-handler-1", "Running")
    for name in ("quantize-load", "prepare-data", "snr-analyze", "measure-base"):
        workflow.step(f"exit-handler-1.{name}", "Succeeded", cached=name == "quantize-load")
    workflow.group("exit-handler-1.branch-hybrid", "Running")
    workflow.step("exit-handler-1.branch-hybrid.select-layers", "Succeeded")
    return workflow


def test_a_pod_that_has_just_gone_has_no_log(
    cluster: KubernetesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    assert Pods("kubeflow").log("gone") == ""


def told(server: KfpServer, run_id: str, workflow: Workflow, state: str) -> None:
    """KFP knows of this workflow."""
    server.state.runs[run_id] |= {"state": state, "run_details": {"task_details": workflow.task_details()}}


@pytest.mark.parametrize(
    ("became", "says", "words"),
    [
        ("out of memory", "", ["memory.limit", "OOMKilled (exit code 137)"]),
        ("refused", "", ["error: train.batch_size: '9': expected less"]),
        ("raised", "", ["KeyError: 'x'"]),
        ("too long", "", ["time_limit", "active on the node longer"]),
        ("too much written", "", ["ephemeral-storage limit", "scratch"]),
        # As a node with a full disk said it.
        ("too much written", "The node was low on resource: ephemeral-storage.", ["memory or disk"]),
    ],
)
def test_a_failed_step_is_shown_with_its_own_reason(
    became: str, says: str, words: list[str], command: Command, server: KfpServer, cluster: KubernetesServer
) -> None:
    run_id, workflow = submitted(command, server)
    workflow.step(TRAIN, "Failed", ("Failed", "Error (exit code 1)"), ("Failed", "Error (exit code 1)"))
    workflow.end("Failed")
    cluster.workflows.append(workflow.object())
    old = pod("t-1", run_id, "train", "hybrid", "2026-11-26T12:30:00Z", became="raised")
    cluster.pods += [
        pod("t-2", run_id, "train", "hybrid", became=became, says=says),
        old,
        pod("other", "run", "train", "hybrid"),
    ]
    log = RECORDED["logs"].get(became, {"body": "step 7 of 40\n"})["body"]
    cluster.logs = {"t-1": "error: of the first attempt\n", "t-2": log}
    told(server, run_id, workflow, "FAILED")
    shown = command("status", run_id)
    assert shown.exit_code == 0, (shown.output, shown.exception)
    lines = shown.output.splitlines()
    assert lines[0].startswith("Run mine: FAILED") and lines[0].endswith(f"/#/runs/details/{run_id}")
    (at,) = [n for n, line in enumerate(lines) if "train (hybrid, round 1)" in line]
    assert "failed" in lines[at] and "1m35s" in lines[at] and "attempt 2" in lines[at]
    for word in words:
        assert word in lines[at + 1], shown.output
    assert any("quantize-load  cached" in line for line in lines)
    assert any("compare  skipped" in line for line in lines)


def test_a_step_that_is_tried_again_is_shown_with_why_the_attempt_before_failed(
    command: Command, server: KfpServer, cluster: KubernetesServer
) -> None:
    run_id, workflow = submitted(command, server)
    workflow.step(TRAIN, "Running", ("Failed", "main: Error (exit code 75)"), ("Running", ""))
    cluster.workflows.append(workflow.object())
    told(server, run_id, workflow, "RUNNING")
    cluster.logs = {
        "t-1": "error: no answer: tracking.uri: 'http://mlflow': expected more\n",
        "t-2": "step 1\n",
    }
    cluster.pods.append(pod("t-1", run_id, "train", "hybrid", "2026-11-26T12:30:00Z", became="raised"))

    def shown() -> str:
        lines = command("status", "mine").output.splitlines()
        (at,) = [n for n, line in enumerate(lines) if "train (hybrid, round 1)" in line]
        assert "running" in lines[at], lines
        return lines[at + 1].strip(" │")

    own = "error: no answer: tracking.uri: 'http://mlflow': expected more"
    assert own in shown() and "before" not in shown()
    cluster.pods.append(pod("t-2", run_id, "train", "hybrid", "2026-11-26T13:00:00Z"))
    assert f"the attempt before: {own}" in shown()
    cluster.pods[-1] = pod("t-2", run_id, "train", "hybrid", "2026-11-26T13:00:00Z", became="no secret")
    assert "Secret or ConfigMap" in shown()
    # One that began before this round's step did is of an earlier round.
    cluster.pods[:] = [pod("t-1", run_id, "train", "hybrid", "2026-11-26T11:00:00Z", became="raised")]
    assert own not in shown()


@pytest.mark.parametrize(
    ("became", "words"),
    [
        ("no image", ["image.tag", "registry.invalid/none-such:1"]),
        ("no image by name", ["pull_secrets", "No/such:1"]),
        ("no node", ["no node has room", "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."]),
        ("no secret", ["Secret or ConfigMap", 'secret "none-such" not found']),
        ("over quota", ["quota has no room", "limits.cpu=8"]),
    ],
)
def test_a_step_that_waits_is_shown_with_what_it_waits_for(
    became: str, words: list[str], command: Command, server: KfpServer, cluster: KubernetesServer
) -> None:
    run_id, workflow = submitted(command, server)
    has_pod = became in RECORDED["pods"]
    message = "" if has_pod else json.loads(RECORDED[became]["body"])["message"]
    workflow.step(TRAIN, "Running", ("Pending", message))
    cluster.workflows.append(workflow.object())
    if has_pod:
        cluster.pods.append(pod("t-1", run_id, "train", "hybrid", became=became))
    told(server, run_id, workflow, "RUNNING")
    lines = command("status", "mine").output.splitlines()
    (at,) = [n for n, line in enumerate(lines) if "train (hybrid, round 1)" in line]
    assert "running" in lines[at]
    for word in words:
        assert word in lines[at + 1], lines


def test_without_kubernetes_the_tree_is_kfps_own_and_says_what_is_missing(
    command: Command, server: KfpServer, cluster: KubernetesServer
) -> None:
    run_id, workflow = submitted(command, server)
    workflow.step(TRAIN, "Failed", ("Failed", "OOMKilled (exit code 137)"))
    workflow.end("Failed")
    told(server, run_id, workflow, "FAILED")
    cluster.refuses = True
    shown = command("status", run_id)
    assert "quantize-load  cached" in shown.output
    assert any("train (hybrid, round 1)  failed" in line for line in shown.output.splitlines())
    assert (
        "Why steps failed or wait is not known: kubeconfig: 'kubeflow': expected permission" in shown.stderr
    )


def test_a_run_that_there_is_not_is_refused(command: Command, server: KfpServer) -> None:
    for wanted in ("nobody", "0b1f2c3d-0000-4000-8000-123456789abc"):
        with pytest.raises(InputError, match=f"RUN: '{wanted}': expected a run's id or name"):
            raise command("status", wanted).exception  # type: ignore[misc]
    server.problems.clear()


def test_logs_are_of_the_newest_attempt_unless_all_are_wanted(
    command: Command, server: KfpServer, cluster: KubernetesServer
) -> None:
    run_id, _ = submitted(command, server)
    for number, method in enumerate(("hybrid", "hybrid", "qlora")):
        cluster.pods.insert(0, pod(f"t-{number}", run_id, "train", method, f"2026-11-26T1{number}:00:00Z"))
        cluster.logs[f"t-{number}"] = f"one\nof {number}\n"
    assert command("logs", run_id, "train", "--method", "hybrid").output == "one\nof 1\n"
    assert command("logs", run_id, "train", "--method", "hybrid", "--tail", "1").output == "of 1\n"
    every = command("logs", run_id, "train", "--all")
    assert [line for line in every.stdout.splitlines() if line != "one"] == ["of 0", "of 1", "of 2"]
    assert "t-2 qlora" in every.stderr
    for arguments, words in (
        (["train"], "--method: '': expected one of hybrid, qlora"),
        (["promote"], "STEP: 'promote': expected a step whose pods are still there"),
        (["trian"], "STEP: 'trian': expected one of the steps"),
    ):
        with pytest.raises(InputError, match=words):
            raise command("logs", run_id, *arguments).exception  # type: ignore[misc]


def following(server: KfpServer, cluster: KubernetesServer, ends: list[tuple[str, str]]) -> list[str]:
    """Let runs end one after the other, each with a state and the last line of its training; the runs' ids."""
    looks: dict[str, int] = {}
    order: list[str] = []

    def on_look(run: dict[str, Any]) -> None:
        run_id = run["run_id"]
        if run_id not in looks:
            order.append(run_id)
        looks[run_id] = looks.get(run_id, 0) + 1
        state, log = ends[order.index(run_id)]
        workflow = begun(next(iter(server.state.versions.values()))["pipeline_spec"], run_id)
        if looks[run_id] == 1:
            workflow.step(TRAIN, "Running", ("Running", ""))
            state = "RUNNING"
        else:
            good = state == "SUCCEEDED"
            workflow.step(TRAIN, "Succeeded" if good else "Failed")
            workflow.end("Succeeded" if good else "Failed")
        became = "raised" if looks[run_id] > 1 else "running"
        cluster.pods[:] = [pod("t", run_id, "train", "hybrid", became=became)]
        cluster.logs["t"] = log
        cluster.workflows[:] = [workflow.object()]
        run |= {"state": state, "run_details": {"task_details": workflow.task_details()}}

    server.on_look = on_look
    return order


def test_a_failed_run_is_submitted_again_as_often_as_wanted_with_the_same_arguments(
    command: Command, server: KfpServer, cluster: KubernetesServer
) -> None:
    order = following(server, cluster, [("FAILED", "KeyError: 1\n"), ("FAILED", ""), ("SUCCEEDED", "")])
    done = command("submit", "--watch", "--resubmit", "3", "--set", "checkpoint.destination=s3://bucket/c")
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(order) == len(server.state.runs) == 3 and len(server.state.versions) == 1
    first, *others = [run["runtime_config"]["parameters"] for run in server.state.runs.values()]
    assert all(other == first for other in others)
    lines = done.output.splitlines()
    assert any(line.endswith("train (hybrid, round 1): running") for line in lines)
    assert any(
        "train (hybrid, round 1): KeyError: 1; submitted again, 2 times are left" in line for line in lines
    )
    assert lines[-1].endswith("succeeded")
    assert "checkpoint.destination" not in done.stderr


@pytest.mark.parametrize(
    ("ends", "arguments", "runs", "words"),
    [
        ([("FAILED", "KeyError: 1\n")], [], 1, "is FAILED; train (hybrid, round 1): KeyError: 1"),
        ([("FAILED", "")] * 2, ["--resubmit", "1"], 2, "is FAILED"),
        ([("FAILED", "error: no answer: tracking.uri: 'x': expected y\n")] * 2, ["--resubmit", "1"], 2, "no answer"),
        ([("FAILED", "error: data.source: 'x': expected y\n")], ["--resubmit", "3"], 1, "error: data.source"),
        ([("CANCELED", "")], ["--resubmit", "3"], 1, "is CANCELED"),
    ],
)  # fmt: skip
def test_a_run_that_would_fail_again_or_was_ended_by_someone_is_not_submitted_again(
    ends: list[tuple[str, str]], arguments: list[str], runs: int, words: str,
    command: Command, server: KfpServer, cluster: KubernetesServer,
) -> None:  # fmt: skip
    following(server, cluster, ends)
    done = command("submit", "--watch", *arguments)
    assert isinstance(done.exception, StepFailed) and words in str(done.exception)
    assert len(server.state.runs) == runs
    assert ("checkpoint.destination" in done.stderr) == bool(arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resubmit", "1"], "--resubmit: '1': expected --watch"),
        (["--watch", "--resubmit", "1", "--no-cache"], "--resubmit: '1': expected no --no-cache"),
        (["--watch", "--upload-only"], "--watch: 'True': expected no --upload-only"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], words: str, command: Command, server: KfpServer
) -> None:
    assert str(command("submit", *arguments).exception).startswith(words)
    assert not [request for request in server.requests if request.startswith("POST")]
