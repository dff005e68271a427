"""The memory plan: its parts against real models and by hand, what it advises, and its command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from spectraqlora.errors import InputError
from spectraqlora.models import adapters
from spectraqlora.models.activations import recomputed
from spectraqlora.models.loading import load_four_bit
from spectraqlora.places import base_place
from spectraqlora.planning import memory_plan
from spectraqlora.settings import ModelSettings, Settings, parse
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora_pipelines.local.preflight import memory_warning
from transformers import AutoConfig

from tests.families import write_family

ROWS, TOKENS = 4, 64
CLI = [sys.executable, "-m", "spectraqlora_pipelines.cli"]


def small(**sections: Any) -> Settings:
    return parse({"select": {"rank": 8, "rank_high": 8, "rank_low": 4}, **sections})


def really_kept(model: Any, padded: bool) -> int:
    """Bytes that a real forward pass keeps, without the weights."""
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and not recomputed(tensor):
            seen[storage._cdata] = storage
        return tensor

    ids = torch.randint(3, 50, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, TOKENS - 5 :] = int(not padded)
    model.get_output_embeddings().forward = lambda hidden: hidden
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
    del outputs
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "gpt2"])
def test_activations_counted_without_storage_are_those_of_the_real_4_bit_model(
    family: str, dtype: str, tmp_path: Path
) -> None:
    write_family(family, tmp_path / "base")
    (tmp_path / "quantized").mkdir()
    manifest = quantize(
        ModelSettings(base_model=str(tmp_path / "base"), compute_dtype=dtype),
        tmp_path / "quantized",
        tmp_path / "outline",
    )
    outline = memory_plan.Outline(
        AutoConfig.from_pretrained(tmp_path / "base"), 4 if dtype == "float32" else 2
    )
    assert (outline.parameters, outline.four_bit) == (manifest.parameters, manifest.four_bit_parameters)
    ranks = memory_plan.surrogate_map("hybrid", outline, small())
    for padded in (False, True):
        planned = memory_plan.kept_activations(
            adapters.attach(outline.build(), ranks), ROWS, TOKENS, padded, cuda=False
        )
        model, _ = load_four_bit(tmp_path / "quantized")
        real = really_kept(adapters.attach(model, ranks).train(), padded)
        assert sum(planned.blocks) + planned.outside == pytest.approx(real, rel=0.01)


def test_every_block_keeps_the_same_and_checkpointing_one_input_of_each() -> None:
    outline = memory_plan.Outline(memory_plan.config_of("7B"), 2)
    ranks = memory_plan.surrogate_map("qlora", outline, small())
    model = adapters.attach(outline.build(), ranks)
    kept = memory_plan.kept_activations(model, 1, 128, padded=False, cuda=True)
    assert len(kept.blocks) == 32
    # The embeddings below the first block need no gradient.
    assert len(set(kept.blocks[1:])) == 1 and kept.blocks[0] < kept.blocks[1]
    assert kept.inputs == (128 * 4096 * 2,) * 32
    saved = sum(kept.blocks[0:32:3]) - sum(kept.inputs[0:32:3])
    assert kept.with_recomputation(3) == (kept.outside + sum(kept.blocks) - saved, kept.again[3])
    assert kept.with_recomputation(0) == (kept.outside + sum(kept.blocks), 0)


def test_a_7b_model_in_four_bits_takes_what_its_numbers_say() -> None:
    outline = memory_plan.Outline(memory_plan.config_of("7B"), 2)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    other = 2 * 32_000 * 4096 + 65 * 4096
    assert outline.four_bit == linear and outline.parameters == linear + other
    constants = linear // 64 + -(-linear // 64 // 256) * 4
    assert outline.weight_bytes == linear // 2 + constants + 2 * other


@pytest.mark.parametrize(("name", "billions"), [("7B", 6.74), ("13b", 13.02), ("65B", 65.29), ("70B", 68.98)])
def test_the_named_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert memory_plan.Outline(memory_plan.config_of(name), 2).parameters / 1e9 == pytest.approx(
        billions, abs=0.01
    )


def test_memory_follows_rank_batch_length_checkpointing_and_optimizer(tiny_model: Path) -> None:
    outline = memory_plan.Outline(memory_plan.config_of(str(tiny_model)), 4)

    def of(method: str = "qlora", **sections: Any) -> memory_plan.Training:
        settings = small(**sections)
        ranks = memory_plan.surrogate_map(method, outline, settings)
        return memory_plan.training(outline, ranks, settings, cuda=False)

    plain = of()
    rank_8 = 4 * 8 * sum(m.in_features + m.out_features for m in outline.modules)
    assert (plain.adapters, plain.gradients, plain.optimizer) == (rank_8, rank_8, 2 * rank_8)
    assert of(train={"batch_size": 16}).activations == pytest.approx(2 * plain.activations, rel=0.01)
    longest, half, beyond = (of(data={"max_length": n, "pack": True}).activations for n in (128, 64, 4096))
    assert longest == pytest.approx(2 * half, rel=0.01) and beyond == longest, "the model has 128 positions"
    some, every = (of(train={"gradient_checkpointing": choice}) for choice in ("some", "on"))
    assert (
        every.activations < plain.activations / 3 and every.activations < some.activations < plain.activations
    )
    assert of(method="hybrid").total < plain.total
    assert of(train={"optimizer": "adamw_8bit"}).optimizer == plain.optimizer // 4


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "mpt", "t5"])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_families_with_experts_own_masks_and_encoders_are_planned(
    family: str, dtype_bytes: int, tmp_path: Path
) -> None:
    write_family(family, tmp_path)
    outline = memory_plan.Outline(memory_plan.config_of(str(tmp_path)), dtype_bytes)
    found = memory_plan.plan(outline, small(), cuda=dtype_bytes == 2)
    assert all(need.device + need.host > 0 for need in found.needs)


def test_every_step_and_method_is_planned_and_the_advice_fits(tiny_model: Path) -> None:
    outline = memory_plan.Outline(memory_plan.config_of(str(tiny_model)), 4)
    found = memory_plan.plan(outline, small(methods="qlora,sgm"), cuda=True)
    assert [(n.step, n.method) for n in found.needs] == [
        ("quantize-load", ""), ("snr-analyze", ""),
        ("select-layers", "qlora"), ("train", "qlora"), ("re-evaluate", "qlora"),
        ("select-layers", "sgm"), ("train", "sgm"), ("re-evaluate", "sgm"), ("merge-export", ""),
    ]  # fmt: skip
    train = found.needs[3]
    change, then = found.changes(train, train.device // 2)
    assert then <= train.device // 2 and "--set" in change
    assignments = [part for part in change.split() if "=" in part]
    from spectraqlora.settings import with_overrides

    changed = parse(with_overrides(small(methods="qlora,sgm").model_dump(mode="json"), assignments))
    again = memory_plan.plan(outline, changed, cuda=True).needs[3]
    assert again.device == then
    rows = changed.train.batch_size * changed.train.gradient_accumulation
    assert rows == found.settings.train.batch_size
    change, then = found.changes(train, 1)
    assert "GiB" in change and then > 1


@pytest.mark.parametrize("source", ["8B", "./none", "/nowhere/model"])
def test_a_model_without_a_config_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"model\.base_model") as caught:
        memory_plan.config_of(source)
    assert "\n" not in str(caught.value) and "70B" in str(caught.value)


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
