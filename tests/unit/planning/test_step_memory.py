"""Memory of every step, what to change where it does not fit, and the two places that say so."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from spectraqlora.places import base_place
from spectraqlora.planning.advice import changes
from spectraqlora.planning.shape import ModelShape, config_of
from spectraqlora.planning.steps import PROCESS_BYTES, Plan, StepMemory, calibration, plan, scoring, shape_of
from spectraqlora.planning.training import WORKSPACES, surrogate_map, training
from spectraqlora.settings import parse, with_overrides
from spectraqlora_pipelines.local.preflight import memory_warning

from tests.architectures import ARCHITECTURES, written
from tests.small import small

CLI = [sys.executable, "-m", "spectraqlora_pipelines.cli"]


def step(planned: Plan, name: str, method: str = "") -> StepMemory:
    return next(memory for memory in planned.steps if (memory.step, memory.method) == (name, method))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *itertools.product(["qwen3-moe", "deepseek-v3", "mpt", "t5"], ["bfloat16", "float32"]),
        *itertools.product(["mamba-2", "qwen3-next", "granite-4", "qwen3-vl"], ["bfloat16"]),
    ],
)
def test_families_with_experts_own_masks_states_encoders_and_towers_are_planned(
    family: str, dtype: str, tmp_path: Path
) -> None:
    written(ARCHITECTURES[family], tmp_path)
    shape = ModelShape(config_of(str(tmp_path)), dtype)
    planned = plan(shape, small(methods="qlora"), cuda=dtype == "bfloat16")
    assert all(memory.device + memory.host > 0 for memory in planned.steps)


def test_every_step_and_method_is_planned_and_the_advice_fits(tiny_model: Path) -> None:
    shape = ModelShape(config_of(str(tiny_model)), "float32")
    planned = plan(shape, small(methods="qlora,sgm"), cuda=True)
    assert [(memory.step, memory.method) for memory in planned.steps] == [
        ("quantize-load", ""), ("snr-analyze", ""), ("measure-base", ""),
        ("select-layers", "qlora"), ("train", "qlora"), ("re-evaluate", "qlora"),
        ("select-layers", "sgm"), ("train", "sgm"), ("re-evaluate", "sgm"), ("merge-export", ""),
    ]  # fmt: skip
    train = step(planned, "train", "qlora")
    half = WORKSPACES + (train.device - WORKSPACES) // 2
    change, then = changes(planned, train, half)
    assert then <= half and "--set" in change
    assignments = [part for part in change.split() if "=" in part]
    changed = parse(with_overrides(small(methods="qlora,sgm").model_dump(mode="json"), assignments))
    assert step(plan(shape, changed, cuda=True), "train", "qlora").device == then
    rows = changed.train.batch_size * changed.train.gradient_accumulation
    assert rows == planned.settings.train.batch_size
    change, then = changes(planned, train, 1)
    assert "GiB" in change and then > 1


def test_measure_base_holds_the_4_bit_base_and_the_larger_of_its_score_and_its_gradients(
    tiny_model: Path,
) -> None:
    shape = ModelShape(config_of(str(tiny_model)), "float32")
    for rows, largest in ((64, "gradients"), (1, "evaluation")):
        settings = small(select={"calibration_rows": rows, "rank": 8}, methods="qlora,sgm")
        gradients = sum(calibration(shape, settings, cuda=True).values())
        memory = step(plan(shape, settings, cuda=True), "measure-base")
        assert (
            memory.device
            == shape.weight_bytes + max(gradients, scoring(shape, settings, cuda=True)) + WORKSPACES
        )
        assert memory.largest == largest
    weights_alone = small(
        select={"calibration_rows": 64, "rank": 8, "signal": "spectrum"}, methods="qlora,hybrid"
    )
    memory = step(plan(shape, weights_alone, cuda=True), "measure-base")
    assert memory.device == shape.weight_bytes + scoring(shape, weights_alone, cuda=True) + WORKSPACES, (
        "no method asks for gradients"
    )
    planned = plan(shape, small(select={"calibration_rows": 64, "rank": 8}, methods="sgm"), cuda=True)
    change, then = changes(planned, step(planned, "measure-base"), step(planned, "measure-base").device - 1)
    assert "select.calibration_rows=" in change and then < step(planned, "measure-base").device


def test_select_layers_holds_sketches_where_its_method_reads_them_and_never_a_model() -> None:
    shape = ModelShape(config_of("7B"), "bfloat16")
    planned = plan(shape, small(methods="qlora,sgm"), cuda=True)
    without, with_sketches = step(planned, "select-layers", "qlora"), step(planned, "select-layers", "sgm")
    assert (without.device, without.host) == (with_sketches.device, PROCESS_BYTES) == (0, PROCESS_BYTES)
    size, inputs = planned.settings.select.sketch_size, 6 * 4096 + 11008
    outputs = 5 * 4096  # All but gate and up are as wide as the residual stream.
    assert with_sketches.host == PROCESS_BYTES + 4 * size * 32 * (inputs + outputs + 7 * size)
    assert (
        step(plan(shape, small(methods="qlora"), cuda=False), "select-layers", "qlora").device
        == PROCESS_BYTES
    )


def test_re_evaluate_measures_gradients_only_where_another_round_follows(tiny_model: Path) -> None:
    shape = ModelShape(config_of(str(tiny_model)), "float32")
    peaks = {
        (method, rounds): step(
            plan(
                shape,
                small(select={"calibration_rows": 64, "rank": 8}, rounds=rounds, methods=method),
                cuda=True,
            ),
            "re-evaluate",
            method,
        )
        for method in ("hybrid", "qlora")
        for rounds in (1, 2)
    }
    assert peaks["hybrid", 2].largest == "gradients"
    assert peaks["hybrid", 2].device > peaks["hybrid", 1].device
    assert peaks["qlora", 2] == peaks["qlora", 1], "its ranks never move"


def test_the_command_prints_steps_and_advice_and_refuses_bad_sizes(tiny_model: Path) -> None:
    done = subprocess.run(
        [*CLI, "plan", "--base-model", str(tiny_model), "--gpu", "0.7GB", "--methods", "qlora",
         "--set", "select.rank=4", "--set", "train.batch_size=64"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train (qlora)" in done.stdout and "merge-export" in done.stdout
    assert "train (qlora) takes" in done.stdout
    refused = subprocess.run([*CLI, "plan", "--gpu", "lots"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: --gpu: ")


def test_a_run_warns_of_a_step_that_takes_more_than_this_machine_has(tiny_model: Path) -> None:
    base = base_place(str(tiny_model))
    assert memory_warning(small(), base) == ""
    warning = memory_warning(small(train={"batch_size": 2**24}), base)
    assert warning.startswith("Memory: train (")
    assert "GiB that this machine has; the command plan" in warning
    assert memory_warning(small(), base_place("s3://bucket/model")) == ""


@pytest.mark.parametrize(("name", "per_layer"), [("mamba-2", 2 * 64 * 16), ("qwen3-next", 4 * 16 * 16)])
def test_states_of_recurrent_layers_are_planned(name: str, per_layer: int, tmp_path: Path) -> None:
    shape = ModelShape(config_of(str(written(ARCHITECTURES[name], tmp_path))), "float32")
    keys = 0 if name == "mamba-2" else 2 * 2 * 16 * 4
    assert shape.past(3, 10) - shape.past(3, 0) == 2 * 3 * 10 * keys
    assert shape.past(3, 0) == 2 * 3 * per_layer * 4


def test_float16_in_which_adapters_do_not_multiply_takes_more_than_bfloat16() -> None:
    needed = {}
    for dtype in ("bfloat16", "float16"):
        settings = small(
            methods="qlora", model={"compute_dtype": dtype, "base_model": "7B"}, train={"batch_size": 4}
        )
        shape = shape_of("7B", settings, cuda=True)
        memory = training(shape, surrogate_map("qlora", shape, settings), settings, cuda=True)
        needed[dtype] = memory.activations + memory.block
    # Autograd keeps what both factors multiply with: of A, in the first case, what is there anyway.
    assert needed["float16"] > 1.1 * needed["bfloat16"]
