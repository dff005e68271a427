"""Training in two processes: the numbers of one process, whether the base is whole in each or sharded."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from spectraqlora.artifacts import TrainingLog
from spectraqlora.errors import InputError
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit
from spectraqlora.settings import EvaluateSettings, ModelSettings, TrackingSettings, TrainSettings
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora.steps.train import distributed
from spectraqlora.steps.train.step import run as run_train

from tests.architectures import ARCHITECTURES, written
from tests.unit.models.test_adapters import DOWN, Q0, Q1, logits, randomize, rank_map


def _train(
    processes: int, ranks: Path, quantized: Path, prepared: Path, work: Path, **settings: Any
) -> TrainingLog:
    """The train step, as the pipeline calls it."""
    output = work / f"adapter-{processes}"
    plan = TrainSettings(max_steps=4, evaluations=2, processes=processes, **settings)
    run_train(
        rounds=1,
        train_settings=plan.model_dump(),
        evaluate_settings=EvaluateSettings(batch_size=2).model_dump(),
        tracking_settings=TrackingSettings(uri=f"sqlite:///{work}/mlflow.db").model_dump(),
        checkpoint_settings={},
        seed=1,
        four_bit=SimpleNamespace(path=str(quantized)),
        rows=SimpleNamespace(path=str(prepared)),
        rank_map=SimpleNamespace(path=str(ranks)),
        adapter=SimpleNamespace(path=str(output)),
    )
    return TrainingLog.read(output)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"parallel": "ddp", "batch_size": 2, "gradient_accumulation": 2}, id="ddp"),
        pytest.param({"parallel": "fsdp", "batch_size": 4, "gradient_checkpointing": "on"}, id="fsdp"),
    ],
)
def test_two_processes_train_as_one_does(
    settings: dict[str, Any], quantized: Path, prepared: Path, tmp_path: Path
) -> None:
    # Two modules of different blocks share a pair, two of a block share A, two share B, one shares nothing.
    k, v, o = (Q1.replace("q_proj", f"{name}_proj") for name in "kvo")
    ranks = {Q0: 4, Q1: 4, k: 4, v: 4, o: 2, DOWN: 2, DOWN.replace("2", "3"): 2}
    groups = {Q0: 0, Q1: 0, k: 1, v: 1, o: 2, DOWN: 2}
    rank_map(quantized, ranks, groups, {1: "A", 2: "B"}).write(tmp_path / "ranks")
    one, two = (
        _train(count, tmp_path / "ranks", quantized, prepared, tmp_path, **settings) for count in (1, 2)
    )
    assert (one.processes, two.processes) == (1, 2)
    assert [step for step, _ in two.loss_curve] == [1, 2, 3, 4]
    for kind in ("loss_curve", "eval_curve"):
        losses = [[loss for _, loss in getattr(log, kind)] for log in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert one.eval_curve[0][1] > one.eval_curve[-1][1]
    assert two.train_tokens == one.train_tokens
    assert two.trainable_parameters == one.trainable_parameters
    first, second = (adapters.read_adapter_weights(tmp_path / f"adapter-{count}") for count in (1, 2))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-5)
    assert torch.equal(second[f"{Q0}.lora_B"], second[f"{Q1}.lora_B"])
    assert torch.equal(second[f"{k}.lora_A"], second[f"{v}.lora_A"])
    assert torch.equal(second[f"{o}.lora_B"], second[f"{DOWN}.lora_B"])
    assert min(second[name].abs().max() for name in (f"{Q0}.lora_B", f"{k}.lora_B", f"{o}.lora_A")) > 0


def test_training_processes_listen_to_this_machine_alone_and_open_no_store(
    quantized: Path, prepared: Path, tmp_path: Path
) -> None:
    rank_map(quantized, {Q0: 4}).write(tmp_path / "ranks")
    listening: dict[int, set[str]] = {}
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    for connection in process.net_connections("inet"):
                        if connection.status == psutil.CONN_LISTEN:
                            listening.setdefault(process.pid, set()).add(connection.laddr.ip)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        _train(2, tmp_path / "ranks", quantized, prepared, tmp_path)
    finally:
        finished.set()
        watching.join()
    # Each of the two processes accepts the other's connection; there is no third one, such as a launcher's store.
    assert len(listening) == 2
    assert set.union(*listening.values()) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_process_that_is_ended_ends_the_others_and_the_step(
    number: signal.Signals, quantized: Path, prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rank_map(quantized, {Q0: 4}).write(tmp_path / "ranks")

    def strike() -> None:
        while not (workers := psutil.Process().children(recursive=True)):
            time.sleep(0.05)
        # Before it can defer a signal: as a process that ends for reasons of its own.
        workers[-1].send_signal(number)

    striking = threading.Thread(target=strike)
    striking.start()
    with pytest.raises(SystemExit) as ended:
        _train(2, tmp_path / "ranks", quantized, prepared, tmp_path)
    striking.join()
    assert ended.value.code == 128 + number
    assert f"was ended by {number.name}" in capfd.readouterr().out
    assert not psutil.Process().children(recursive=True)


def test_what_a_process_refuses_ends_the_step_with_its_code(
    quantized: Path, prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = rank_map(quantized, {Q0: 4}).model_copy(update={"base_digest": "0" * 64})
    ranks.write(tmp_path / "ranks")
    with pytest.raises(SystemExit) as ended:
        _train(2, tmp_path / "ranks", quantized, prepared, tmp_path)
    assert ended.value.code == 2
    assert "error: rank map base_digest" in capfd.readouterr().out
    assert not (tmp_path / "adapter-2" / TrainingLog.filename()).exists()


@pytest.fixture
def one_process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_sharding_takes_the_blocks_weights_and_leaves_adapters_and_numbers(quantized: Path) -> None:
    from torch.distributed.tensor import DTensor

    wrapped = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {Q0: 2, DOWN: 4}))
    randomize(wrapped)
    wrapped.eval()
    before = logits(wrapped)
    distributed.shard_base(wrapped)
    sharded = {name for name, p in wrapped.named_parameters() if isinstance(p, DTensor)}
    in_blocks = {name for name, _ in wrapped.named_parameters() if ".layers." in name and "lora_" not in name}
    assert sharded == in_blocks and len(sharded) == 4 * 9
    assert torch.equal(logits(wrapped), before)
    assert all(not isinstance(weight, DTensor) for weight in adapters.adapter_weights(wrapped).values())


def test_blocks_are_the_outermost_numbered_modules() -> None:
    def stack() -> torch.nn.Module:
        return torch.nn.ModuleList(
            torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(2, 2)])}) for _ in range(2)
        )

    model = torch.nn.ModuleDict({"encoder": stack(), "decoder": stack(), "head": torch.nn.Linear(2, 2)})
    names = {module: name for name, module in model.named_modules()}
    assert [names[block] for block in distributed.blocks(model)] == [
        "encoder.0",
        "encoder.1",
        "decoder.0",
        "decoder.1",
    ]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "expected"),
    [(8, 1, 1, (8, 1)), (8, 1, 4, (2, 1)), (2, 4, 2, (2, 2)), (4, 2, 8, (1, 1)), (3, 4, 4, (3, 1))],
)
def test_processes_share_a_steps_rows(
    batch_size: int, accumulation: int, processes: int, expected: tuple[int, int]
) -> None:
    settings = TrainSettings(batch_size=batch_size, gradient_accumulation=accumulation)
    rows, passes = distributed.split_batch(settings, processes)
    assert (rows, passes) == expected
    assert rows * passes * processes == batch_size * accumulation


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"train\.batch_size: '3'.*a multiple of 2"):
        distributed.split_batch(TrainSettings(batch_size=3), 2)
    with pytest.raises(InputError, match=r"train\.batch_size"):
        distributed.split_batch(TrainSettings(batch_size=2), 8)


@pytest.mark.usefixtures("one_process_group")
def test_packed_experts_are_sharded_and_give_the_same_gradients(tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor

    base = written(ARCHITECTURES["mixtral"], tmp_path / "base")
    quantize(ModelSettings(base_model=str(base)), tmp_path / "four_bit", tmp_path / "outline")
    found = []
    for sharded in (False, True):
        model, _ = load_four_bit(tmp_path / "four_bit")
        torch.manual_seed(3)
        wrapped = adapters.attach(model, rank_map(tmp_path / "four_bit", {Q0: 2}))
        randomize(wrapped)
        if sharded:
            distributed.shard_base(wrapped)
            experts = [p for name, p in wrapped.named_parameters() if ".experts." in name]
            assert experts
            assert all(isinstance(p, DTensor) for p in experts)
        wrapped.train()
        ids = torch.arange(9, 29)[None]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
        assert bool(gradient.abs().max() > 0)
