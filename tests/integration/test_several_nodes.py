"""Training on several machines: processes with folders of their own, which share a network and an S3 server alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from spectraqlora.artifacts import TrainingLog
from spectraqlora.errors import InputError
from spectraqlora.models import adapters
from spectraqlora.settings import CheckpointSettings, EvaluateSettings, TrackingSettings, TrainSettings
from spectraqlora.steps.train.exchange import fetch_adapter, publish_inputs
from spectraqlora.steps.train.launch import launch
from spectraqlora.steps.train.nodes import Nodes, meet
from spectraqlora.steps.train.request import Inputs, TrainRequest
from spectraqlora.steps.train.training import train
from spectraqlora.storage import Address, folders_below, parse_address

from tests.s3 import BUCKET, Server, environment, free_port
from tests.unit.models.test_adapters import DOWN, Q0, Q1, rank_map

EXCHANGE, CHECKPOINTS = Address(BUCKET, "exchange"), f"s3://{BUCKET}/checkpoints"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(tmp_path / "s3") as running:
        for name, value in environment(running.endpoint).items():
            monkeypatch.setenv(name, value)
        yield running


def request(
    quantized: Path, prepared: Path, folder: Path, every_steps: int = 0, **settings: Any
) -> TrainRequest:
    rank_map(quantized, {Q0: 4, Q1: 2, DOWN: 4}, {Q0: 0, Q1: 1}).write(folder / "ranks")
    return TrainRequest(
        Inputs(quantized, prepared, folder / "ranks"),
        folder / "adapter",
        seed=1,
        train=TrainSettings(evaluations=2, **settings),
        evaluate=EvaluateSettings(batch_size=2),
        tracking=TrackingSettings(uri=f"sqlite:///{folder}/mlflow.db"),
        checkpoint=CheckpointSettings(destination=CHECKPOINTS, every_steps=every_steps, every_minutes=0),
    )


class Machines:
    """Two machines of `processes` each, as Kubeflow Trainer starts them in pods."""

    def __init__(self, folder: Path, processes: int = 1) -> None:
        self._folder, self._processes = folder, processes
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, given: TrainRequest) -> None:
        # A path of the step says nothing on another machine: these cannot be used by mistake.
        inputs = Inputs(Path("/none/four_bit"), Path("/none/rows"), Path("/none/rank_map"))
        text = replace(given, inputs=inputs, output=Path("/none/adapter")).text()
        port = free_port()
        for index in range(2):
            own = self._folder / f"machine-{index}"
            own.mkdir(exist_ok=True)
            variables = {
                "PET_NNODES": "2",
                "PET_NODE_RANK": str(index),
                "PET_NPROC_PER_NODE": str(self._processes),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
                "TMPDIR": str(own),
            }
            command = [sys.executable, "-m", "spectraqlora.steps.train.node", str(EXCHANGE), text]
            with open(own / "log", "ab") as log:
                self.running.append(
                    subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
                )

    def codes(self) -> list[int]:
        """Exit codes, when all have ended."""
        codes = [process.wait(600) for process in self.running]
        self.running.clear()
        return codes

    def log(self, index: int = 0) -> str:
        return (self._folder / f"machine-{index}" / "log").read_text()

    def trained(self, given: TrainRequest, name: str) -> Path:
        """What the machines make of a request."""
        publish_inputs(given, EXCHANGE)
        self.start(given)
        assert self.codes() == [0, 0], self.log(0) + self.log(1)
        return self.fetched(name)

    def fetched(self, name: str) -> Path:
        fetch_adapter(EXCHANGE, self._folder / name, self._folder / f"{name}-scratch")
        return self._folder / name


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    running = Machines(tmp_path)
    yield running
    for process in running.running:
        process.kill()
        process.wait()


def same_numbers(one: Path, other: Path) -> None:
    """Losses of every step within 1e-6, and weights as near as sums in another order are."""
    first, second = TrainingLog.read(one), TrainingLog.read(other)
    for kind in ("loss_curve", "eval_curve"):
        losses = [[loss for _, loss in getattr(log, kind)] for log in (first, second)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert first.train_tokens == second.train_tokens
    weights = [adapters.read_adapter_weights(folder) for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)


def test_two_machines_train_as_one_process_does(
    quantized: Path, prepared: Path, tmp_path: Path, server: Server, machines: Machines
) -> None:
    given = request(quantized, prepared, tmp_path, max_steps=4, batch_size=2, gradient_accumulation=2)
    train(replace(given, checkpoint=CheckpointSettings()))
    together = machines.trained(given, "together")
    same_numbers(given.output, together)
    assert TrainingLog.read(together).processes == 2
    assert not (together / ".cache").exists()
    # The first one alone reports.
    assert "4/4 alors round 1: training step" in machines.log(0)
    assert "training step" not in machines.log(1)


@pytest.mark.soak
def test_two_machines_of_two_processes_shard_the_base_within_each(
    quantized: Path, prepared: Path, tmp_path: Path, server: Server
) -> None:
    given = request(quantized, prepared, tmp_path, max_steps=4, batch_size=4, parallel="fsdp")
    train(replace(given, checkpoint=CheckpointSettings()))
    together = Machines(tmp_path, processes=2).trained(given, "together")
    same_numbers(given.output, together)
    assert TrainingLog.read(together).processes == 4


@pytest.mark.e2e
def test_a_machine_that_is_lost_ends_the_other_and_both_resume_from_the_address(
    quantized: Path, prepared: Path, tmp_path: Path, server: Server, machines: Machines
) -> None:
    given = request(
        quantized, prepared, tmp_path, every_steps=4, max_steps=24, batch_size=2, lora_dropout=0.2
    )
    publish_inputs(given, EXCHANGE)
    machines.start(given)
    place = parse_address(CHECKPOINTS)
    while not any(
        name.startswith("step-") and complete
        for training in folders_below(place)
        for name, complete in folders_below(place.child(training)).items()
    ):
        assert all(process.poll() is None for process in machines.running), machines.log(0) + machines.log(1)
        time.sleep(0.1)
    for process in psutil.Process(machines.running[1].pid).children(recursive=True):
        process.kill()
    codes = machines.codes()
    assert codes[1] == 137 and codes[0] not in (0, 2), codes
    machines.start(given)
    assert machines.codes() == [0, 0], machines.log(0) + machines.log(1)
    assert "resuming from the checkpoint of step" in machines.log(0)
    resumed = machines.fetched("resumed")
    # Two processes of one machine do the same sums in the same order.
    launch(2, replace(given, checkpoint=CheckpointSettings()))
    first, second = (adapters.read_adapter_weights(folder) for folder in (resumed, given.output))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert TrainingLog.read(resumed).loss_curve == TrainingLog.read(given.output).loss_curve


def test_the_store_listens_where_the_first_machine_is_known_and_nowhere_else() -> None:
    port = free_port()
    store = meet(f"tcp://127.0.0.1:{port}", 0, 2)
    other = meet(f"tcp://127.0.0.1:{port}", 1, 2)
    other.set("from", "the other")
    assert store.get("from") == b"the other"
    listening = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr.port == port]
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("PET_NNODES", "", r"PET_NNODES: '': expected a number from 1"),
        ("PET_NPROC_PER_NODE", "auto", r"PET_NPROC_PER_NODE: 'auto': expected a number from 1"),
        ("PET_NODE_RANK", "2", r"PET_NODE_RANK: '2': expected a number below PET_NNODES, which is 2"),
        ("PET_NODE_RANK", "-1", r"PET_NODE_RANK: '-1': expected a number from 0"),
        ("PET_MASTER_ADDR", "", r"PET_MASTER_ADDR: '': expected the first machine's name"),
        ("PET_MASTER_PORT", "x", r"PET_MASTER_PORT: 'x': expected a number from 1"),
    ],
)
def test_variables_that_say_nothing_are_one_line(
    variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {
        "NNODES": "2",
        "NODE_RANK": "1",
        "NPROC_PER_NODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for name, usual in good.items():
        monkeypatch.setenv(f"PET_{name}", usual)
    assert Nodes.from_environment().interface().startswith("lo")
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=expected):
        Nodes.from_environment()
