"""Training under SIGKILL at random moments, and under a store that goes away: nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from spectraqlora.artifacts import TrainingLog
from spectraqlora.settings import CheckpointSettings, TrainSettings
from spectraqlora.storage import folders_below, parse_address

from tests.integration.test_dag import CLI
from tests.s3 import BUCKET, Server, environment
from tests.unit.models.test_adapters import DOWN, Q0, Q1, rank_map
from tests.unit.steps.train.test_checkpoints import same, trained

pytestmark = pytest.mark.e2e

KILLS = 24
STEPS = 400
SETTINGS = TrainSettings(
    max_steps=STEPS, batch_size=2, gradient_accumulation=2, lora_dropout=0.2, evaluations=5, weight_decay=0.01
)
PRELOADED = ["spectraqlora.steps.train.training", "transformers", "peft", "bitsandbytes", "datasets", "boto3"]


def attempt(
    folders: tuple[Path, Path, Path, Path],
    checkpoint: CheckpointSettings,
    variables: dict[str, str],
    log: Path,
) -> None:
    """One pod's life: a process of its own, started from one that has only imported libraries."""
    os.environ.update(variables)
    sys.stdout = open(log, "a", buffering=1)  # noqa: SIM115 - until the process ends
    quantized, prepared, ranks, output = folders
    trained(quantized, prepared, ranks, output, checkpoint, SETTINGS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


def test_twenty_kills_at_random_moments_change_nothing(
    server: Server, quantized: Path, prepared: Path, tmp_path: Path
) -> None:
    """Every other pod starts on an empty disk and has only what the store holds."""
    rank_map(quantized, {Q0: 4, Q1: 2, DOWN: 4}, {Q0: 0, Q1: 1}).write(tmp_path / "ranks")
    folders = quantized, prepared, tmp_path / "ranks"
    trained(*folders, tmp_path / "uninterrupted", CheckpointSettings(), SETTINGS)

    def place(number: int) -> CheckpointSettings:
        return CheckpointSettings(
            folder=str(tmp_path / "kept"),
            destination=f"s3://{BUCKET}/kills-{number}",
            every_steps=3,
            every_minutes=0,
        )

    checkpoint = place(trainings := 1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    noise, output, log = random.Random(time.time_ns()), tmp_path / "adapter", tmp_path / "log"
    kills = in_training = 0
    deadline = time.monotonic() + 900
    while kills < KILLS:
        shutil.rmtree(output, ignore_errors=True)
        if kills % 2:
            shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        log.write_text("")
        process = context.Process(
            target=attempt, args=((*folders, output), checkpoint, environment(server.endpoint), log)
        )
        process.start()
        # One in six dies before it trains; the others anywhere in the steps, checkpoints and uploads after.
        if noise.random() > 1 / 6:
            while "training step" not in log.read_text() and process.is_alive():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            in_training += 1
        time.sleep(noise.uniform(0, 1.0))
        if (
            not process.is_alive()
        ):  # A fast machine: this training is done, and another one is killed from here on.
            assert process.exitcode == 0, log.read_text()
            same(output, tmp_path / "uninterrupted")
            shutil.rmtree(tmp_path / "kept", ignore_errors=True)
            checkpoint = place(trainings := trainings + 1)
            continue
        process.kill()
        process.join()
        kills += 1
    last = context.Process(
        target=attempt, args=((*folders, output), checkpoint, environment(server.endpoint), log)
    )
    last.start()
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert in_training >= KILLS / 2 and "resuming from the checkpoint of step" in log.read_text()
    same(output, tmp_path / "uninterrupted")
    losses = TrainingLog.read(output).loss_curve
    assert len(losses) == 100 and losses[-1][0] == STEPS


def test_a_store_that_is_down_for_half_a_minute_costs_nothing(
    quantized: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_map(quantized, {Q0: 4, DOWN: 4}).write(tmp_path / "ranks")
    folders = quantized, prepared, tmp_path / "ranks"
    settings = SETTINGS.model_copy(update={"max_steps": 40})
    trained(*folders, tmp_path / "uninterrupted", CheckpointSettings(), settings)
    with Server(tmp_path / "s3") as server:
        for name, value in environment(server.endpoint).items():
            monkeypatch.setenv(name, value)
        destination = f"s3://{BUCKET}/outage"
        away = threading.Event()

        def outage() -> None:
            while not list((tmp_path / "s3" / BUCKET).glob("outage/*/step-*/_manifest.json")):
                time.sleep(0.005)
            server.stop()
            away.set()
            time.sleep(30)
            server.start()

        thread = threading.Thread(target=outage)
        thread.start()
        trained(
            *folders,
            tmp_path / "adapter",
            CheckpointSettings(destination=destination, every_steps=2),
            settings,
        )
        thread.join()
        assert away.is_set()
        same(tmp_path / "adapter", tmp_path / "uninterrupted")
        (identity,) = folders_below(parse_address(destination))
        found = folders_below(parse_address(destination).child(identity))
        assert {name[:14] for name, complete in found.items() if complete} == {
            "step-000000038",
            "step-000000040",
        }


def test_a_stopped_run_resumes_in_the_middle_of_its_training(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """Ended by SIGTERM, which leaves time for a checkpoint, then by SIGKILL, then not at all."""
    workdir = tmp_path / "w"
    arguments = [
        "run", "--base-model", str(tiny_model), "--data", str(tiny_rows), "--workdir", str(workdir),
        "--methods", "qlora", "--max-steps", "120", "--set", "evaluate.accuracy_rows=0",
        "--set", "checkpoint.every_steps=50",
    ]  # fmt: skip

    def steps() -> set[int]:
        found = (workdir / "artifacts" / "checkpoints").glob("*/step-*")
        return {int(path.name[5:14]) for path in found if not path.suffix}

    def training() -> bool:
        log = workdir / "run.log"
        return log.exists() and "round 1: training step" in log.read_text()

    before = 0
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            [*CLI, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 600
        while not training() if number == signal.SIGTERM else max(steps()) <= before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode == code
        assert not psutil.wait_procs(children, timeout=60)[1]
        before = max(steps())
        if number == signal.SIGTERM:
            assert before % 50, "a checkpoint of its own, outside the interval"
            stopped = before
    assert f"resuming from the checkpoint of step {stopped}\n" in (workdir / "run.log").read_text()
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("resuming from the checkpoint of step", (workdir / "run.log").read_text())) == 2


SEVERAL = """
import sys
from pathlib import Path
from types import SimpleNamespace
from spectraqlora.steps.train.step import run as run_train
*folders, uri, kept = sys.argv[1:]
names = "four_bit", "rows", "rank_map", "adapter"
run_train(
    rounds=1,
    train_settings={
        "max_steps": 30, "batch_size": 4, "lora_dropout": 0.2, "processes": 2, "evaluations": 3,
    },
    evaluate_settings={},
    tracking_settings={"uri": uri},
    checkpoint_settings={"folder": kept, "every_steps": 2},
    seed=1,
    **{name: SimpleNamespace(path=path) for name, path in zip(names, folders, strict=True)},
)
"""


def test_several_processes_resume_together(quantized: Path, prepared: Path, tmp_path: Path) -> None:
    rank_map(quantized, {Q0: 4, DOWN: 4}).write(tmp_path / "ranks")

    def start(name: str) -> subprocess.Popen[str]:
        places = quantized, prepared, tmp_path / "ranks", tmp_path / name
        command = [*map(str, places), f"sqlite:///{tmp_path / name}.db", str(tmp_path / f"{name}-kept")]
        return subprocess.Popen(
            [sys.executable, "-c", SEVERAL, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    uninterrupted = start("uninterrupted")
    printed, _ = uninterrupted.communicate(timeout=900)
    assert uninterrupted.returncode == 0, printed
    cut = start("cut")
    while not [p for p in (tmp_path / "cut-kept").glob("*/step-*") if not p.suffix]:
        assert cut.poll() is None, cut.communicate()[0]
        time.sleep(0.02)
    os.killpg(cut.pid, signal.SIGKILL)
    cut.wait()
    last = start("cut")
    printed, _ = last.communicate(timeout=900)
    assert last.returncode == 0, printed
    assert "resuming from the checkpoint of step" in printed
    same(tmp_path / "cut", tmp_path / "uninterrupted")
    assert TrainingLog.read(tmp_path / "cut").processes == 2
