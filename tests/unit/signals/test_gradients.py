"""Sketches of gradients against the gradients themselves; what they cost; how they are stored."""

import contextlib
from pathlib import Path

import pytest
import torch
from spectraqlora.artifacts import FourBitModel
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.modules import dequantized_weight
from spectraqlora.scoring.batches import Collator, load_rows
from spectraqlora.settings import SelectSettings
from spectraqlora.signals import gradients
from spectraqlora.signals.gradients import (
    SKETCHES,
    GradientSketch,
    read_sketches,
    sketch_gradients,
    starting_directions,
    write_sketches,
)

from tests.modules import first_ranks, modules


def test_sketched_cosines_agree_with_full_gradients(quantized: Path, prepared: Path) -> None:
    model, _ = load_four_bit(quantized)
    modules = FourBitModel.read(quantized).modules
    few = list(Collator(0, None).batches(load_rows(prepared, "train"), 8, limit=3))
    sketches = sketch_gradients(model, modules, few, 96, seed=1)
    assert len(sketches) == len(modules)

    exact: dict[str, torch.Tensor] = {}
    full = model.dequantize().float()
    named = dict(full.named_modules())
    for info in modules:
        named[info.module].weight.requires_grad_(True)
    for batch in few:
        full(**batch).loss.backward()
    for info in modules:
        exact[info.module] = named[info.module].weight.grad / len(few)
        assert dequantized_weight(named[info.module]).shape == exact[info.module].shape
    for a in modules:
        for b in modules:
            if (a.type, a.out_features, a.in_features) != (b.type, b.out_features, b.in_features):
                continue
            true = torch.cosine_similarity(exact[a.module].flatten(), exact[b.module].flatten(), dim=0)
            left, right = sketches[a.module].sketch.flatten(), sketches[b.module].sketch.flatten()
            assert abs(float(torch.cosine_similarity(left, right, dim=0) - true)) < 0.05


def test_gradient_snr_and_energy_are_those_of_the_full_gradients(quantized: Path, prepared: Path) -> None:
    model, _ = load_four_bit(quantized)
    (info,) = [m for m in FourBitModel.read(quantized).modules if m.module.endswith("1.self_attn.q_proj")]
    few = list(Collator(0, None).batches(load_rows(prepared, "train"), 4, limit=4))
    sketch = sketch_gradients(model, [info], few, 64, seed=1)[info.module]
    full = model.dequantize().float()
    weight = dict(full.named_modules())[info.module].weight
    weight.requires_grad_(True)
    exact = torch.stack([torch.autograd.grad(full(**batch).loss, weight)[0] for batch in few])
    mean = exact.mean(0)
    assert sketch.energy(4) == pytest.approx(float((torch.linalg.svdvals(mean)[:4] ** 2).sum()), rel=1e-3)
    expected = float((mean**2).sum() / exact.var(0).sum())
    assert sketch.gradient_snr == pytest.approx(expected, rel=1e-3)


def test_calibration_keeps_the_inputs_of_the_blocks_and_recomputes_them(
    quantized: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_four_bit(quantized)
    modules = FourBitModel.read(quantized).modules
    few = list(Collator(0, None).batches(load_rows(prepared, "train"), 8, limit=2))
    runs: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        again = sketch_gradients(model, modules, few, 64, seed=1)
        assert sorted(runs) == sorted([0, 1, 2, 3] * 2 * len(few))
        assert not any(module.training for module in model.modules())
        few_kept = sum(kept)
        monkeypatch.setattr(gradients, "blocks_recomputed", lambda _: contextlib.nullcontext())
        plain = sketch_gradients(model, modules, few, 64, seed=1)
    assert sum(kept) - few_kept > 3 * few_kept
    for name, sketch in plain.items():
        assert torch.equal(sketch.range_sketch, again[name].range_sketch)
        assert sketch.gradient_snr == again[name].gradient_snr


def test_one_pass_over_all_modules_gives_what_a_pass_over_some_gives(quantized: Path, prepared: Path) -> None:
    model, manifest = load_four_bit(quantized)
    few = list(Collator(0, None).batches(load_rows(prepared, "train"), 4, limit=2))
    together = sketch_gradients(model, manifest.modules, few, 32, seed=1)
    some = manifest.modules[5::4]
    alone = sketch_gradients(model, some, few, 32, seed=1)
    assert list(alone) == [m.module for m in some]
    for name, sketch in alone.items():
        torch.testing.assert_close(sketch.range_sketch, together[name].range_sketch, rtol=1e-5, atol=1e-8)
        assert sketch.gradient_snr == pytest.approx(together[name].gradient_snr, rel=1e-5)


def test_stored_sketches_come_back_to_the_last_bit_and_in_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Of an infinite ratio too: a module whose batches agree; and one whose tensor is no block of memory.
    sketches = {
        "model.layers.1.q": GradientSketch(torch.randn(8, 3), torch.randn(3, 3), 1 / 3),
        "model.layers.0.q": GradientSketch(torch.randn(3, 8).T, torch.randn(3, 3), float("inf")),
    }
    write_sketches(sketches, tmp_path)
    stored = read_sketches(tmp_path)
    assert list(stored) == list(sketches)
    for name, sketch in sketches.items():
        assert torch.equal(stored[name].range_sketch, sketch.range_sketch)
        assert torch.equal(stored[name].sketch, sketch.sketch)
        assert stored[name].gradient_snr == sketch.gradient_snr
    assert {path.name for path in tmp_path.iterdir()} == {SKETCHES}


def test_a_folder_without_sketches_has_none_and_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    assert read_sketches(tmp_path) == {}
    write_sketches({"m": GradientSketch(torch.eye(4), torch.eye(4), 1.0)}, tmp_path)
    complete = (tmp_path / SKETCHES).read_bytes()
    for damaged in (complete[:-8], b"", b"no sketches"):
        (tmp_path / SKETCHES).write_bytes(damaged)
        with pytest.raises(InputError, match=r"gradient sketches: .*cut short"):
            read_sketches(tmp_path)


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (32, 32)])
def test_the_start_has_the_directions_of_lora_ga_and_the_norm_of_a_random_one(
    rows: int, columns: int
) -> None:
    from peft import LoraConfig, LoraGAConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    rank, gradient = 4, torch.randn(rows, columns) @ torch.diag(torch.linspace(3, 0.1, columns))
    layer = torch.nn.Linear(columns, rows, bias=False)
    layer._peft_loraga_grad = gradient
    config = LoraConfig(r=rank, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction="ArB2r"))
    theirs = Linear(layer, "default", config, r=rank).lora_A["default"].weight.detach()

    (info,) = modules(1, q=(rows, columns))
    # A sketch as wide as the side is the gradient itself.
    sketch = GradientSketch(gradient.T.contiguous(), gradient, 1.0)
    rank_map = first_ranks("qlora", [info], {}, SelectSettings(rank=rank))
    ours = starting_directions({info.module: sketch}, rank_map)[info.module]
    cosines = torch.nn.functional.cosine_similarity(ours, theirs)
    torch.testing.assert_close(cosines.abs(), torch.ones(rank), rtol=0, atol=1e-3)
    random = torch.nn.init.kaiming_uniform_(torch.empty(2000, columns), a=5**0.5)
    torch.testing.assert_close(ours.norm(dim=1).mean(), random.norm(dim=1).mean(), rtol=0.02, atol=0)
