"""Runs in a real MLflow server: one each whoever asks, and nothing lost while the server is away."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from spectraqlora.artifacts import PreparedRows, RankMap, TrainingLog
from spectraqlora.errors import InputError
from spectraqlora.settings import SelectSettings, TrackingSettings, TrainSettings
from spectraqlora.tracking import live as live_metrics
from spectraqlora.tracking.live import LiveMetrics
from spectraqlora.tracking.runs import Tracker

from tests import s3
from tests.mlflow_server import MlflowServer, basic_auth
from tests.s3 import free_port
from tests.unit.results import evaluation

pytestmark = pytest.mark.e2e
BRANCHES = ("qlora", "hybrid")


def settings(server: MlflowServer, experiment: str, **values: Any) -> TrackingSettings:
    return TrackingSettings(uri=server.uri, experiment=experiment, **values)


def _ask(uri: str, experiment: str, barrier: Any, answers: Any) -> None:
    tracker = Tracker(TrackingSettings(uri=uri, experiment=experiment), "run-1", "train")
    barrier.wait()
    answers.put([tracker.pipeline_run(), *(tracker.branch_run(branch) for branch in BRANCHES)])


def test_steps_that_start_at_once_agree_on_one_run_each(mlflow_server: MlflowServer) -> None:
    context = multiprocessing.get_context("spawn")
    count = 5
    barrier, answers = context.Barrier(count), context.Queue()
    arguments = (mlflow_server.uri, "race", barrier, answers)
    asking = [context.Process(target=_ask, args=arguments) for _ in range(count)]
    for process in asking:
        process.start()
    found = [answers.get(timeout=240) for _ in asking]
    for process in asking:
        process.join()
    assert len({tuple(ids) for ids in found}) == 1, found
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name("race").experiment_id
    runs = client.search_runs([experiment])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 1 + len(BRANCHES) and len(parents) == 1
    for run in runs:
        if run is not parents[0]:
            assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
    assert not [e for e in client.search_experiments() if "run-1" in e.name], "no ballot is left in sight"


def test_a_retry_takes_the_same_runs_and_sweeps_up_what_a_killed_attempt_left(
    mlflow_server: MlflowServer,
) -> None:
    first = Tracker(settings(mlflow_server, "retry"), "run-2")
    ids = [first.pipeline_run(), first.branch_run("qlora")]
    left = first._create("qlora", "qlora", {})
    second = Tracker(settings(mlflow_server, "retry"), "run-2")
    assert [second.pipeline_run(), second.branch_run("qlora")] == ids
    runs = second.client.search_runs([second.experiment])
    assert {run.info.run_id for run in runs} == set(ids) and left not in ids


def test_runs_say_where_they_come_from(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, prepared: Path
) -> None:
    key = "0b1f2c3d-0000-4000-8000-123456789abc"
    monkeypatch.setenv("SPECTRAQLORA_IMAGE_REFERENCE", "registry/spectraqlora/train:0.1.0")
    monkeypatch.setenv("SPECTRAQLORA_REVISION", "abc123")
    tracker = Tracker(settings(mlflow_server, "origin"), key, "train")
    run_id = tracker.branch_run("qlora")
    data = PreparedRows.read(prepared)
    for _ in range(2):
        tracker.log_data(run_id, data)
    run = tracker.client.get_run(run_id)
    assert run.data.tags["kfp.run_id"] == key
    assert run.data.tags["image.train"] == "registry/spectraqlora/train:0.1.0"
    assert run.data.tags["mlflow.source.git.commit"] == "abc123"
    assert run.data.tags["spectraqlora.version"]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == data.digest[:36] and "data.jsonl" in dataset.dataset.source


def test_pipeline_run_and_mlflow_run_lead_to_each_other(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    key = "7c1f2c3d-0000-4000-8000-123456789abc"
    monkeypatch.setenv("SPECTRAQLORA_KFP_UI", "https://kubeflow.example.com/pipeline/")
    monkeypatch.setenv("SPECTRAQLORA_MLFLOW_UI", "https://mlflow.example.com")
    client = MlflowClient(mlflow_server.uri)
    # As KFP's MLflow plugin makes them: a run for the pipeline run, and one of the task below it.
    other = client.create_experiment("KFP-Default")
    theirs = client.create_run(other, tags={"kfp.pipeline_run_id": key}).info.run_id
    task = client.create_run(other, tags={"mlflow.parentRunId": theirs}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", task)
    tracker = Tracker(settings(mlflow_server, "linked"), key, "train")
    run = client.get_run(tracker.pipeline_run())
    pipeline_run = f"https://kubeflow.example.com/pipeline/#/runs/details/{key}"
    assert pipeline_run in run.data.tags["mlflow.note.content"]
    assert run.data.tags["kfp.pipeline_run_url"] == pipeline_run
    address = f"https://mlflow.example.com/#/experiments/{tracker.experiment}/runs/{run.info.run_id}"
    assert tracker.address(run.info.run_id) == address and address in capfd.readouterr().out
    assert client.get_run(theirs).data.tags["spectraqlora.mlflow_run"] == address
    assert run.data.tags["kfp.mlflow_run"].endswith(f"/runs/{theirs}")

    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    Tracker(settings(mlflow_server, "linked"), key, "compare").pipeline_run()
    monkeypatch.delenv("SPECTRAQLORA_KFP_UI")
    local = Tracker(settings(mlflow_server, "linked"), "demo-123", "train")
    tags = client.get_run(local.pipeline_run()).data.tags
    assert "mlflow.note.content" not in tags and "kfp.pipeline_run_url" not in tags


@pytest.mark.parametrize(
    ("state", "end"), [("FAILED", "FAILED"), ("RUNNING", "FAILED"), ("CANCELED", "KILLED")]
)
def test_runs_that_no_step_has_ended_are_closed_and_no_others(
    state: str, end: str, mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The component itself, by KFP's executor, on what a killed training leaves: its run and the pipeline's, open."""
    from spectraqlora.runtime import run_key

    from tests.unit.test_executor import run_step

    section = settings(mlflow_server, f"closed-{state}")
    mine, other = Tracker(section, "mine", "train"), Tracker(section, "other", "train")
    killed, done, parent = mine.branch_run("hybrid"), mine.branch_run("qlora"), mine.pipeline_run()
    mine.finish(done)
    open_elsewhere = other.branch_run("hybrid")
    monkeypatch.setenv(run_key.VARIABLE, "mine")
    given = {"tracking_settings": section.model_dump(mode="json"), "status": {"state": state}}
    for attempt in ("first", "second"):
        run_step("close-runs", tmp_path / attempt, {}, given)
    states = {run: mine.client.get_run(run).info.status for run in (killed, done, parent, open_elsewhere)}
    assert states == {killed: end, done: "FINISHED", parent: end, open_elsewhere: "RUNNING"}
    closed = json.loads((tmp_path / "first" / "closed" / "closed.json").read_text())
    assert closed == {killed: "hybrid", parent: "mine"}
    assert json.loads((tmp_path / "second" / "closed" / "closed.json").read_text()) == {}


def test_a_server_that_is_down_at_the_start_is_one_line_within_seconds() -> None:
    began = time.monotonic()
    with pytest.raises(
        InputError, match=r"tracking\.uri: 'http://127.0.0.1:\d+': expected a reachable MLflow"
    ):
        Tracker(TrackingSettings(uri=f"http://127.0.0.1:{free_port()}"), "x")
    assert time.monotonic() - began < 60


def _history(tracker: Tracker, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracker.client.get_metric_history(run_id, name))


def test_training_goes_on_while_the_server_is_away_and_the_curves_arrive_whole(
    quantized: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from spectraqlora.artifacts import FourBitModel
    from spectraqlora.methods.catalogue import method
    from spectraqlora.steps.train.request import Inputs, TrainRequest
    from spectraqlora.steps.train.training import train

    monkeypatch.setattr(live_metrics, "SEND_SECONDS", 0.1)
    monkeypatch.setattr(live_metrics, "SAMPLE_SECONDS", 0.5)
    manifest = FourBitModel.read(quantized)
    ranks = method("qlora").first_ranks(manifest.modules, {}, SelectSettings(rank=4), 1, {})
    ranks = ranks.model_copy(update={"base_digest": manifest.base_digest})
    ranks.write(tmp_path / "ranks")
    with MlflowServer(tmp_path / "server") as server:
        tracker = Tracker(settings(server, "outage"), "run-3")
        run_id = tracker.branch_run("qlora")
        with LiveMetrics(tracker, run_id) as live:

            def watched(name: str, step: int, value: float) -> None:
                live(name, step, value)
                if name == "train_loss" and step == 4:
                    server.stop()
                if name == "train_loss" and step == 16:
                    deadline = time.monotonic() + 60
                    while live.away_since is None and time.monotonic() < deadline:
                        time.sleep(0.05)
                    server.start()

            inputs = Inputs(quantized, prepared, tmp_path / "ranks")
            plan = TrainSettings(max_steps=24, evaluations=4)
            log = train(TrainRequest(inputs, tmp_path / "adapter", seed=1, train=plan), on_metric=watched)
        for name, points in (("train_loss", log.loss_curve), ("eval_loss_curve", log.eval_curve)):
            assert _history(tracker, run_id, name) == sorted(points)
        assert any(key.startswith("system/") for key in tracker.client.get_run(run_id).data.metrics)
        before = _history(tracker, run_id, "train_loss")
        tracker.log_training(run_id, log, 24)
        assert _history(tracker, run_id, "train_loss") == before, "sending again adds nothing"
    said = capfd.readouterr().out
    assert "WARNING: MLflow does not answer" in said and "MLflow is back" in said


def test_what_could_not_be_sent_at_all_is_sent_by_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(live_metrics, "SEND_SECONDS", 0.1)
    result = evaluation("hybrid", [2.0, 3.0], 100)
    log: TrainingLog = result.rounds[0].training
    assert isinstance(result.rounds[0].rank_map, RankMap)
    with MlflowServer(tmp_path / "server") as server:
        tracker = Tracker(settings(server, "late", patience_seconds=1.0), "run-4")
        run_id = tracker.branch_run("hybrid")
        server.stop()
        began = time.monotonic()
        with LiveMetrics(tracker, run_id) as live:
            for step, loss in log.loss_curve:
                live("train_loss", step, loss)
        assert not tracker.retry_while_away(lambda: tracker.log_training(run_id, log, 10), "the curves")
        assert time.monotonic() - began < 120
        said = capfd.readouterr().out
        assert "WARNING" in said and "sent by the next step" in said
        server.start()
        later = Tracker(settings(server, "late"), "run-4")
        assert later.branch_run("hybrid") == run_id
        later.log_evaluation(run_id, result, {"eval_loss": result.eval_loss})
        assert _history(later, run_id, "train_loss") == log.loss_curve
        assert later.client.get_run(run_id).data.metrics["eval_loss"] == result.eval_loss


def test_a_slow_store_makes_an_upload_slow_and_cuts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time in which any other request is given up is 2 s here, and the store takes 5 s for each object."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")

    def pause(request: s3.Request) -> None:
        time.sleep(5 if request.method == "PUT" else 0)

    with s3.Server(tmp_path / "s3") as store, s3.Proxy(store.port, pause) as slow:
        server = MlflowServer(
            tmp_path / "server",
            artifacts=f"s3://{s3.BUCKET}/mlflow",
            environment={**s3.environment(slow.endpoint), "MLFLOW_S3_ENDPOINT_URL": slow.endpoint},
        )
        with server:
            tracker = Tracker(settings(server, "slow"), "run-6")
            run_id = tracker.pipeline_run()
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "weights.safetensors").write_bytes(bytes(1 << 20))
            tracker.log_folder(run_id, tmp_path / "model", "model")
            assert len(list((store.folder / s3.BUCKET / "mlflow").rglob("weights.safetensors"))) == 1
            assert slow.count("PUT") == 1, "sent once"


@pytest.mark.parametrize("reachable", [True, False])
def test_a_model_comes_through_the_server_only_where_its_store_is_out_of_reach(
    reachable: bool, tmp_path: Path
) -> None:
    """As from outside of a cluster, where the store has no name: what MLflow signs for us gets no answer."""
    from spectraqlora.tracking.registered_model import download_model
    from spectraqlora.tracking.registry import Registry

    def signed(request: s3.Request) -> bool:
        return "X-Amz-Signature" in request.path

    def hang_up(request: s3.Request) -> s3.Fault | None:
        return s3.Fault("drop") if signed(request) and not reachable else None

    with s3.Server(tmp_path / "s3") as store, s3.Proxy(store.port, hang_up) as seen:
        server = MlflowServer(
            tmp_path / "server",
            artifacts=f"s3://{s3.BUCKET}/mlflow",
            environment={**s3.environment(seen.endpoint), "MLFLOW_S3_ENDPOINT_URL": seen.endpoint},
        )
        with server:
            chosen = settings(server, "outside", registered_model="m")
            tracker = Tracker(chosen, "run-7")
            run_id = tracker.pipeline_run()
            (tmp_path / "model").mkdir()
            for number in range(3):
                (tmp_path / "model" / f"part-{number}").write_text("whole")
            (tmp_path / "model" / "MLmodel").write_text("flavors: {}")
            tracker.log_folder(run_id, tmp_path / "model", "model")
            client = tracker.client
            client.create_registered_model("m")
            client.create_model_version("m", f"{client.get_run(run_id).info.artifact_uri}/model", run_id)
            registry = Registry(chosen)
            for name in ("one", "two"):
                (tmp_path / name).mkdir()
            began = time.monotonic()
            folder = download_model(chosen, registry.version(1), tmp_path / "one")
            kept = registry.download(registry.version(1), "model", tmp_path / "two")
            assert time.monotonic() - began < 30
            names = ["MLmodel", *(f"part-{number}" for number in range(3))]
            for found in (folder, kept):
                assert set(names) <= {path.name for path in found.iterdir()}
            asked = sum(map(signed, seen.requests))
            assert asked > len(names) if reachable else asked == 1, "one question says that nobody answers"


def test_basic_auth_allowed_hosts_and_artifacts_in_s3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = "a-long-enough-password"
    with s3.Server(tmp_path / "s3") as store:
        server = MlflowServer(
            tmp_path / "server",
            artifacts=f"s3://{s3.BUCKET}/mlflow",
            environment={
                **s3.environment(store.endpoint),
                "MLFLOW_S3_ENDPOINT_URL": store.endpoint,
                **basic_auth(tmp_path, password),
            },
        )
        server._arguments = ("--app-name", "basic-auth", "--allowed-hosts", f"127.0.0.1:{server.port}")
        with server:
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
            tracker = Tracker(settings(server, "guarded"), "run-5")
            (tmp_path / "file.txt").write_text("kept")
            tracker.log_file(tracker.pipeline_run(), tmp_path / "file.txt")
            assert [p.read_text() for p in (store.folder / s3.BUCKET / "mlflow").rglob("file.txt")] == [
                "kept"
            ]

            foreign = TrackingSettings(uri=f"http://localhost:{server.port}")
            with pytest.raises(InputError, match="allowed-hosts"):
                Tracker(foreign, "x")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
            with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD") as caught:
                Tracker(settings(server, "guarded"), "run-5")
            assert "wrong" not in str(caught.value) and "\n" not in str(caught.value)
