"""Training: same seed, same numbers; the best adapter is kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spectraqlora.artifacts import PreparedRows, TrainingLog
from spectraqlora.errors import InputError
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.optimizers import check_optimizer
from spectraqlora.settings import TrainSettings
from spectraqlora.steps.train.request import Inputs, TrainRequest
from spectraqlora.steps.train.training import fit, train

from tests.unit.models.test_adapters import DOWN, Q0, rank_map


def test_same_seed_same_numbers(quantized: Path, prepared: Path, tmp_path: Path) -> None:
    rank_map(quantized, {Q0: 4, DOWN: 4}).write(tmp_path / "ranks")
    inputs = Inputs(quantized, prepared, tmp_path / "ranks")
    settings, logs = TrainSettings(max_steps=6, evaluations=3), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        logs.append(train(TrainRequest(inputs, tmp_path / name, seed, train=settings)))
    first, second = (adapters.read_adapter_weights(tmp_path / name) for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert logs[0].loss_curve == logs[1].loss_curve != logs[2].loss_curve
    assert logs[0].best_eval_loss == min(loss for _, loss in logs[0].eval_curve)
    assert TrainingLog.read(tmp_path / "a") == logs[0]


def test_rows_that_share_sequences_train_the_same(quantized: Path, prepared: Path, tmp_path: Path) -> None:
    rank_map(quantized, {Q0: 4, DOWN: 4}).write(tmp_path / "ranks")
    shutil.copytree(prepared, tmp_path / "rows")
    PreparedRows.read(prepared).model_copy(update={"shared_sequences": True}).write(tmp_path / "rows")
    settings, logs = TrainSettings(max_steps=4, evaluations=2), []
    for name, rows in (("alone", prepared), ("shared", tmp_path / "rows")):
        inputs = Inputs(quantized, rows, tmp_path / "ranks")
        logs.append(train(TrainRequest(inputs, tmp_path / name, 1, train=settings)))
    alone, shared = logs
    assert [loss for _, loss in shared.loss_curve] == pytest.approx(
        [loss for _, loss in alone.loss_curve], rel=1e-4
    )
    assert shared.best_eval_loss == pytest.approx(alone.best_eval_loss, rel=1e-4)
    assert shared.train_tokens == alone.train_tokens, "padding is not counted"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs every method recomputes")
@pytest.mark.parametrize(
    ("method", "setting", "recomputed"),
    [
        ("alors", "auto", [0, 1, 2, 3]),
        ("alors", "some", [0, 2]),
        ("alors", "off", []),
        ("hybrid", "auto", []),
    ],
)
def test_alors_recomputes_activations_unless_that_is_turned_off(
    method: str, setting: str, recomputed: list[int], quantized: Path, prepared: Path, tmp_path: Path
) -> None:
    ranks = rank_map(quantized, {Q0: 4, DOWN: 4}).model_copy(update={"method": method})
    model = adapters.attach(load_four_bit(quantized)[0], ranks)
    settings = TrainSettings(max_steps=1, batch_size=2, evaluations=1, gradient_checkpointing=setting)
    request = TrainRequest(Inputs(quantized, prepared, tmp_path), tmp_path / "out", 1, train=settings)
    runs: dict[int, int] = {}
    for layer, block in enumerate(model.get_base_model().model.layers):
        block.self_attn.register_forward_pre_hook(
            lambda module, *_, layer=layer: runs.update(
                {layer: runs.get(layer, 0) + (module.training and torch.is_grad_enabled())}
            )
        )
    fit(model, ranks, request)
    assert [layer for layer, count in sorted(runs.items()) if count == 2] == recomputed, runs


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="these run on GPUs")
def test_optimizers_that_need_a_gpu_are_refused_without_one(name: str) -> None:
    with pytest.raises(InputError, match=rf"train\.optimizer: '{name}'.*need a CUDA device"):
        check_optimizer(name)


def test_blocks_below_the_first_adapter_are_left_out_of_the_backward_pass(quantized: Path) -> None:
    model = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {DOWN: 4}))
    hidden = model(input_ids=torch.arange(3, 23)[None], output_hidden_states=True).hidden_states
    # The embedding and the outputs of blocks 0 and 1, then that of block 2, which holds the adapter.
    assert [states.requires_grad for states in hidden] == [False, False, False, True, True]


@pytest.mark.parametrize(("own", "count"), [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_soon_leave_the_cores_to_others(own: dict[str, str], count: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", "import spectraqlora.steps.train.training"],
        env={**environment, **own, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
