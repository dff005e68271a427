"""Part a: what the card computes, against references in float64 and the same steps on the CPU.

Compute type is float32 on both sides unless a test says otherwise, so that differences are those of kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from spectraqlora.artifacts import (
    BaseMeasurement,
    Evaluation,
    FourBitModel,
    MergedModel,
    RankMap,
    TrainingLog,
)
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import METHODS
from spectraqlora.models import adapters
from spectraqlora.models.experts import packed_experts
from spectraqlora.models.four_bit import copy_dequantized
from spectraqlora.models.hardware import device
from spectraqlora.models.loading import load_four_bit, load_plain, original_folder
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.scoring.batches import Collator, load_rows
from spectraqlora.scoring.loss import score
from spectraqlora.settings import CheckpointSettings, ModelSettings
from spectraqlora.signals.gradients import read_sketches
from spectraqlora.snr.marchenko_pastur import from_singular_values
from spectraqlora.snr.scan import scan
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora.steps.train import distributed

from tests.gpu.correctness import SMALL, WORK
from tests.gpu.journey import Journey
from tests.gpu.record import metered
from tests.gpu.scan import RandomTensors
from tests.gpu.shapes import Shape

pytestmark = pytest.mark.gpu

LOSSES = 1e-3
"""Bound of the relative difference of a loss from the CPU's before training."""
TRAINED = 2e-2
"""The same of losses during and after training, which amplifies rounding."""
SNR = 1e-4
"""Bound of an snr's relative difference from float64 (the scan's own tolerance is 8e-5)."""

small = os.environ.get(SMALL) == "1"
Measured = Callable[[str, float], None]


def relative(value: float, expected: float) -> float:
    return abs(value / expected - 1)


def distance(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together, in float64."""
    assert tensors.keys() == expected.keys()
    squares = [
        ((tensors[name].double().cpu() - e.double().cpu()).square().sum(), e.double().cpu().square().sum())
        for name, e in expected.items()
    ]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the check's parts share, or one of these tests' own."""
    given = os.environ.get(WORK)
    folder = Path(given) / "correctness" if given else tmp_path_factory.mktemp("correctness")
    folder.mkdir(exist_ok=True)
    return folder


class Beside:
    """A Python process that runs while the tests go on."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with open(log, "wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def printed(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-3000:]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


KILLED = """
import os, signal, sys
from pathlib import Path
from spectraqlora.settings import CheckpointSettings
from tests.gpu.journey import Journey

def die(name, step, value):
    if name == "train_loss" and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

journey = Journey(Path(sys.argv[1]), Path(sys.argv[2]), small=sys.argv[3] == "1")
kept = CheckpointSettings(folder=sys.argv[4], every_steps=2, every_minutes=0)
journey.train("hybrid", "killed", checkpoint=kept, on_metric=die)
"""
"""A training that ends in the middle of its third step, after the checkpoint of the second."""


class Twins:
    """The same run on this process's device, and beside it on the CPU."""

    def __init__(self, work: Path) -> None:
        self.card = Journey(work / "float32", work / "card", small)
        self.cpu = Journey(work / "float32", work / "cpu", small)
        self.card.quantize("float32")
        self.card.prepare()
        self.card.measure()
        for method in METHODS:
            self.card.select_layers(method, self.card.rank_map(method))
        of_cpu = ["-m", "tests.gpu.journey", "--work", str(self.cpu.work), "--output", str(self.cpu.output)]
        threads = "1" if small else str(max(1, (os.cpu_count() or 1) // 2))
        self.beside = Beside(
            [*of_cpu, *(["--small"] if small else [])],
            work / "cpu.log",
            {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads},
        )
        self.kept = work / "kept"
        arguments = [str(self.card.work), str(self.card.output), str(int(small)), str(self.kept)]
        self.killed = Beside(["-c", KILLED, *arguments], work / "killed.log", {})

    def both(self, kind: Any, path: Callable[[Journey], Path]) -> tuple[Any, Any]:
        """An artifact of the card's run and of the CPU's, which may still be on its way."""
        assert self.beside.process.wait() == 0, self.beside.printed()
        return kind.read(path(self.card)), kind.read(path(self.cpu))


@pytest.fixture(scope="session")
def twins(work: Path) -> Iterator[Twins]:
    made = Twins(work)
    yield made
    made.beside.end()
    made.killed.end()


@pytest.fixture(scope="session")
def trained(twins: Twins) -> dict[str, TrainingLog]:
    """Every method trained and evaluated on the card."""
    logs = {method: twins.card.train(method) for method in METHODS}
    for method in METHODS:
        twins.card.evaluate(method)
    return logs


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Keeps a number that a test has measured, for the check's table."""
    return record_property


def randomized(model: Any) -> Any:
    """A PEFT model whose adapters have random B, so that they change what it computes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values.to(parameter.dtype))
    return model


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """The model's own loss, and the gradients of its adapters."""
    place = next(model.parameters()).device
    loss = model(**{key: value.to(place) for key, value in batch.items()}).loss
    loss.backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), {name: p.grad for name, p in named.items() if p.grad is not None}


def mixture(folder: Path, width: int, chosen: int) -> Path:
    """A random mixture of four experts, `chosen` of them for each token, in a folder."""
    from spectraqlora.sample import make, world
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make._tokenizer(world.corpus(world.people(0, 12), 0, 300))
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        moe_intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        num_experts=4,
        num_experts_per_tok=chosen,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("dtype", "loss_bound", "gradient_bound"),
    [("float32", 1e-5, 1e-3), ("bfloat16", 1e-2, 5e-2)],
    ids=["float32", "bfloat16"],
)
def test_a_4_bit_forward_and_backward_pass_is_that_of_its_weights_in_float64(
    dtype: Any, loss_bound: float, gradient_bound: float, twins: Twins, work: Path, measured: Measured
) -> None:
    journey = twins.card
    if dtype != "float32":
        journey = Journey(work / dtype, work / dtype / "card", small)
        journey.quantize(dtype)
    ranks = RankMap.read(twins.card.rank_map("qlora"))
    model, manifest = load_four_bit(journey.four_bit)
    batch = Collator.of(model.config)([load_rows(twins.card.rows, "train")[i] for i in range(4)])
    plain = load_plain(original_folder(manifest), torch.float64).cpu()
    copy_dequantized(model, plain, set())
    exact = randomized(adapters.attach(plain, ranks).double())
    expected, exact_gradients = loss_and_gradients(exact, batch)

    loss, gradients = loss_and_gradients(randomized(adapters.attach(model, ranks)), batch)
    assert len(gradients) == 2 * len(ranks.active())
    measured("loss off by", relative(loss, expected))
    measured("gradients off by", distance(gradients, exact_gradients))
    assert relative(loss, expected) < loss_bound
    assert distance(gradients, exact_gradients) < gradient_bound


def test_the_base_measures_as_on_the_cpu(twins: Twins, measured: Measured) -> None:
    card, cpu = twins.both(BaseMeasurement, lambda journey: journey.measurement)
    measured("loss off by", relative(card.loss, cpu.loss))
    assert relative(card.loss, cpu.loss) < LOSSES
    assert card.row_losses == pytest.approx(cpu.row_losses, rel=10 * LOSSES)
    ours, theirs = read_sketches(twins.card.measurement), read_sketches(twins.cpu.measurement)
    off = distance(
        {name: sketch.sketch for name, sketch in ours.items()},
        {name: sketch.sketch for name, sketch in theirs.items()},
    )
    measured("gradient sketches off by", off)
    assert off < 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_a_method_selects_as_on_the_cpu(method: str, twins: Twins, measured: Measured) -> None:
    def path(journey: Journey) -> Path:
        return journey.rank_map(method) if journey is twins.card else journey.output / "rank_map" / method

    card, cpu = twins.both(RankMap, path)
    ours, theirs = ({m.module: m.rank for m in ranks.active()} for ranks in (card, cpu))
    same = sum(theirs.get(name) == rank for name, rank in ours.items())
    measured("alike", same / len(ours))
    # Scores that differ by rounding alone may stand in another order.
    assert len(ours) == len(theirs) and same >= 0.9 * len(ours)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_as_on_the_cpu(
    method: str, twins: Twins, trained: dict[str, TrainingLog], measured: Measured
) -> None:
    card, cpu = twins.both(TrainingLog, lambda journey: journey.adapter(method))
    assert [step for step, _ in card.loss_curve] == list(range(1, twins.card.train_settings.max_steps + 1))
    off = max(relative(a, b) for (_, a), (_, b) in zip(card.loss_curve, cpu.loss_curve, strict=True))
    after, after_cpu = twins.both(Evaluation, lambda journey: journey.evaluation(method))
    measured("training losses off by", off)
    measured("held-out loss off by", relative(after.eval_loss, after_cpu.eval_loss))
    measured("held-out loss", after.eval_loss)
    assert off < TRAINED and relative(after.eval_loss, after_cpu.eval_loss) < TRAINED
    assert after.eval_loss < after.base_eval_loss
    assert card.trainable_parameters == cpu.trainable_parameters


@pytest.mark.usefixtures("trained")
def test_the_winner_merges_and_its_reloaded_export_scores_the_same_on_the_cpu(
    twins: Twins, measured: Measured
) -> None:
    merged: MergedModel = twins.card.merge()
    held_out = load_rows(twins.card.rows, "held_out")
    plain = load_plain(twins.card.output / "exported" / "merged", torch.float32).cpu()
    reloaded = score(plain, held_out, 8).loss
    measured("merged loss", merged.verified_eval_loss)
    measured("reloaded off by", relative(reloaded, merged.verified_eval_loss))
    assert relative(reloaded, merged.verified_eval_loss) < LOSSES
    assert relative(merged.eval_loss_quantized, merged.adapter_eval_loss) < TRAINED


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_adamw_trains_as_adamw_does(
    optimizer: Any, twins: Twins, trained: dict[str, TrainingLog], measured: Measured
) -> None:
    settings = twins.card.train_settings.model_copy(update={"optimizer": optimizer})
    if device() == "cpu":
        with pytest.raises(InputError, match=r"train\.optimizer"):
            twins.card.train("qlora", optimizer, settings)
        return
    log = twins.card.train("qlora", optimizer, settings)
    off = relative(log.best_eval_loss, trained["qlora"].best_eval_loss)
    measured("held-out loss off by", off)
    assert off < 5e-2
    assert log.loss_curve[-1][1] < log.loss_curve[0][1]


def test_losses_are_the_same_whatever_is_recomputed(twins: Twins, measured: Measured) -> None:
    curves = {}
    for choice in ("off", "some", "on"):
        settings = twins.card.train_settings.model_copy(
            update={"max_steps": 4, "gradient_checkpointing": choice}
        )
        with metered() as meter:
            log = twins.card.train("qlora", f"recompute-{choice}", settings)
        curves[choice] = [loss for _, loss in log.loss_curve]
        measured(f"MiB, {choice}", meter.peak / 2**20)
    off = max(relative(a, b) for c in ("some", "on") for a, b in zip(curves[c], curves["off"], strict=True))
    measured("losses off by", off)
    assert off < 1e-4


@pytest.fixture
def one_process_group() -> Iterator[None]:
    backend = "nccl" if device() == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_base_computes_what_the_complete_one_does(twins: Twins, measured: Measured) -> None:
    from torch.distributed.tensor import DTensor

    ranks = RankMap.read(twins.card.rank_map("qlora"))
    rows = load_rows(twins.card.rows, "train")
    results = []
    for sharded in (False, True):
        model = load_four_bit(twins.card.four_bit, "cpu" if sharded else "")[0]
        batch = Collator.of(model.config)([rows[i] for i in range(4)])
        wrapped = randomized(adapters.attach(model, ranks))
        if sharded:
            distributed.shard_base(wrapped)
            assert any(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
        batch = {name: tensor.to(device()) for name, tensor in batch.items()}
        loss = wrapped(**batch).loss
        loss.backward()
        named = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
        results.append((float(loss.detach()), named))
    (loss, gradients), (sharded_loss, sharded_gradients) = results
    measured("loss off by", relative(sharded_loss, loss))
    measured("gradients off by", distance(sharded_gradients, gradients))
    assert relative(sharded_loss, loss) < 1e-5 and distance(sharded_gradients, gradients) < 1e-4


def test_a_killed_training_resumes_and_ends_as_if_nothing_had_happened(
    twins: Twins, trained: dict[str, TrainingLog], measured: Measured
) -> None:
    card, kept = twins.card, twins.kept
    assert twins.killed.process.wait() == -9, twins.killed.printed()
    steps: list[int] = []
    log = card.train(
        "hybrid",
        "killed",
        checkpoint=CheckpointSettings(folder=str(kept), every_steps=2, every_minutes=0),
        on_metric=lambda name, step, value: steps.append(step) if name == "train_loss" else None,
    )
    assert steps[0] == 3, "training resumes after the checkpoint of step 2"
    off = max(
        relative(a, b) for (_, a), (_, b) in zip(log.loss_curve, trained["hybrid"].loss_curve, strict=True)
    )
    weights, expected = (adapters.read_adapter_weights(card.adapter(name)) for name in ("killed", "hybrid"))
    measured("losses off by", off)
    measured("adapter off by", distance(weights, expected))
    assert off < 1e-4 and distance(weights, expected) < 1e-2


def test_the_snr_scan_is_that_of_float64(twins: Twins, measured: Measured) -> None:
    manifest = FourBitModel.read(twins.card.four_bit)
    # Large matrices in bfloat16 take a faster way than small ones.
    large = Shape(256, 512, 1, 4, 2, 8) if small else Shape(1024, 1536, 1, 8, 4, 8)
    for name, tensors in (
        ("model", LocalTensors(original_folder(manifest))),
        ("large", RandomTensors(large, 1)),
    ):
        table = scan(tensors)
        worst = 0.0
        for row in table.itertuples():
            weight = tensors.load(f"{row.module}.weight").double().cpu()
            expected = from_singular_values(torch.linalg.svdvals(weight), tuple(weight.shape))
            worst = max(worst, relative(row.snr, expected.snr), relative(row.s1, expected.s1))
            assert row.above == expected.above
        measured(f"{name}, off by", worst)
        assert len(table) >= 7 and worst < SNR


@pytest.mark.parametrize(
    ("dtype", "chosen", "bound"),
    [("float32", 2, 1e-3), ("bfloat16", 4, 5e-2)],
    ids=["float32", "bfloat16"],
)
def test_experts_in_4_bits_compute_what_their_weights_do_in_float64(
    dtype: Any, chosen: int, bound: float, tmp_path: Path, measured: Measured
) -> None:
    """In bfloat16 every token goes to all experts: rounding would choose others than float64 does."""
    width = 64 if small else 512
    base = mixture(tmp_path / "base", width, chosen)
    settings = ModelSettings(base_model=str(base), compute_dtype=dtype)
    quantize(settings, tmp_path / "four_bit", tmp_path / "outline")
    model, manifest = load_four_bit(tmp_path / "four_bit")
    assert len(list(packed_experts(model))) == 4
    plain = load_plain(original_folder(manifest), torch.float64).cpu()
    plain.set_experts_implementation("eager")  # Grouped products are not there in float64.
    copy_dequantized(model, plain, set())
    ids = torch.arange(9, 9 + 4 * 24).view(4, 24)
    results = []
    for each in (model, plain):
        each.requires_grad_(False)
        place = next(each.parameters()).device
        inputs = each.get_input_embeddings()(ids.to(place)).detach().requires_grad_()
        with metered() as meter:
            logits = each(inputs_embeds=inputs).logits
            logits.double().square().mean().backward()
        measured(f"MiB, {'4 bits' if each is model else 'float64'}", meter.peak / 2**20)
        results.append({"logits": logits.detach(), "gradients": inputs.grad})
    for name in ("logits", "gradients"):
        off = distance({name: results[0][name]}, {name: results[1][name]})
        measured(f"{name} off by", off)
        assert off < bound
