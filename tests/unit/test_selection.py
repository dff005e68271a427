"""Rank maps: counts, tiers, learning rates; gradients and groups."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spectraqlora.artifacts import GRADIENT_INIT, FourBitModel, LinearModule, RankMap
from spectraqlora.errors import InputError
from spectraqlora.methods.grouping import group_by_similarity
from spectraqlora.methods.ranks import check_rank, cost, rank_map
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.modules import dequantized_weight
from spectraqlora.scoring.batches import Collator, load_rows
from spectraqlora.settings import SelectSettings, SnrSettings
from spectraqlora.signals import gradients
from spectraqlora.signals.gradients import GradientSketch, sketch_gradients
from spectraqlora.signals.scores import combined, task_scores
from spectraqlora.steps.select_layers.select import select
from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze

MODULES = [
    LinearModule(module=f"m.{i}.{t}", type=t, layer=i, out_features=32, in_features=32, four_bit=True)
    for t in ("q", "k")
    for i in range(8)
]
SCORES = {m.module: (float(m.layer), 0.0) for m in MODULES}


def test_hybrid_takes_the_top_share_of_every_type() -> None:
    found = rank_map("hybrid", MODULES, SCORES, SelectSettings(percent=25), "d", 1)
    assert {m.module for m in found.active()} == {"m.6.q", "m.7.q", "m.6.k", "m.7.k"}


def test_qlora_takes_everything_and_random_as_many_as_hybrid() -> None:
    assert len(rank_map("qlora", MODULES, {}, SelectSettings(), "d", 1).active()) == 16
    assert len(rank_map("random", MODULES, {}, SelectSettings(percent=50), "d", 1).active()) == 8


def test_alors_tiers_ranks_and_mean_learning_rate() -> None:
    settings = SelectSettings(high_percent=25, medium_percent=50, rank_high=16, rank_low=4, high_lr=2)
    found = rank_map("alors", MODULES, SCORES, settings, "d", 1)
    assert [m.rank for m in found.modules if m.type == "q"] == [0, 0, 4, 4, 4, 4, 16, 16]
    assert all(m.alpha == 2 * m.rank for m in found.modules)
    cost = sum(m.rank for m in found.active())
    assert sum(m.rank * m.lr_scale for m in found.active()) / cost == pytest.approx(1)
    assert found.modules[7].lr_scale == pytest.approx(2 * found.modules[3].lr_scale)


MIXED = [
    LinearModule(module=f"m.{i}.{t}", type=t, layer=i, out_features=out, in_features=32, four_bit=True)
    for t, out in (("q", 32), ("up", 96))
    for i in range(8)
]


def _spent(found: RankMap, groups: list[list[str]] | None = None) -> int:
    """Trainable parameters; a group's pair once."""
    seconds = {name for group in groups or [] for name in group[1:]}
    sides = {m.module: cost(m) for m in MIXED}
    return sum(m.rank * sides[m.module] for m in found.active() if m.module not in seconds)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_budget_is_spent_and_not_overspent(share: float) -> None:
    settings = SelectSettings(rank=8, rank_high=8, rank_low=4, budget=share)
    total = _spent(rank_map("qlora", MIXED, {}, SelectSettings(rank=8), "d", 1))
    scores = {m.module: (1.0 + m.layer, 1.0 + m.layer) for m in MIXED}
    for method in ("qlora", "hybrid", "alors"):
        spent = _spent(rank_map(method, MIXED, scores, settings, "d", 1))
        # One rank for all leaves up to a rank's worth over; alors spends to the last whole rank of a module.
        left = total / 8 if method != "alors" else max(map(cost, MIXED))
        assert share * total - left < spent <= share * total


def test_alors_shares_a_budget_in_proportion_to_the_signal() -> None:
    settings = SelectSettings(signal="spectrum", rank=8, budget=0.5, high_percent=50, medium_percent=50)
    scores = {m.module: (0.0, 1.0 + m.layer) for m in MIXED}
    ranks = {m.module: m.rank for m in rank_map("alors", MIXED, scores, settings, "d", 1).modules}
    for kind in ("q", "up"):
        shares = [ranks[f"m.{i}.{kind}"] / (1 + i) for i in range(8)]
        middle = sum(ranks.values()) / sum(1.0 + m.layer for m in MIXED)
        assert all(abs(one - middle) <= 1 / (1 + i) for i, one in enumerate(shares))


def test_a_group_pays_for_its_pair_once() -> None:
    names = [m.module for m in MIXED if m.type == "q"]
    settings = SelectSettings(rank=8, percent=100, budget=0.5)
    scores = {m.module: (1.0, 0.0) for m in MIXED}
    groups = [names, *([m.module] for m in MIXED if m.type == "up")]
    alone = rank_map("sgm", MIXED, scores, settings, "d", 1)
    shared = rank_map("sgm", MIXED, scores, settings, "d", 1, groups)
    assert max(m.rank for m in shared.modules) > max(m.rank for m in alone.modules)
    total = _spent(rank_map("qlora", MIXED, {}, SelectSettings(rank=8), "d", 1))
    assert _spent(shared, groups) <= 0.5 * total


def test_task_scores_by_hand() -> None:
    # Singular values 3, 2, 1: the two largest squares are 13, over 2 x (32 + 32) parameters.
    sketch = GradientSketch(torch.eye(3), torch.diag(torch.tensor([3.0, 1.0, 2.0])), 7.0)
    name = MODULES[0].module
    energy = task_scores("energy", MODULES[:2], {name: sketch}, 2)
    assert energy == {name: (pytest.approx(13 / 128), 7.0)}
    assert task_scores("gradient_snr", MODULES[:2], {name: sketch}, 2)[name][0] == 7.0


def test_the_combined_signal_is_the_mean_place() -> None:
    one = {"a": (1.0, 0.0), "b": (2.0, 0.0), "c": (3.0, 0.0)}
    two = {"a": (9.0, 0.0), "b": (8.0, 0.0), "c": (1.0, 0.0), "d": (0.0, 0.0)}
    # Places of the first: a 0, b 1/2, c 1; of the second: d 0, c 1/3, b 2/3, a 1.
    found = {name: score for name, (score, _) in combined(one, two).items()}
    assert found == pytest.approx({"a": 1 / 2, "b": 7 / 12, "c": 2 / 3})


def test_modules_without_a_score_are_never_selected() -> None:
    scores = {name: value for name, value in SCORES.items() if name != "m.7.q"}
    found = rank_map("hybrid", MODULES, scores, SelectSettings(percent=100), "d", 1)
    assert "m.7.q" not in {m.module for m in found.active()}


def test_a_share_that_selects_nothing_and_ranks_too_large_are_refused() -> None:
    with pytest.raises(InputError, match=r"select\.percent"):
        rank_map("hybrid", MODULES, SCORES, SelectSettings(percent=5), "d", 1)
    with pytest.raises(InputError, match=r"select\.rank: '64'"):
        check_rank(MODULES, SelectSettings(rank=64, rank_high=8), ("hybrid",))
    with pytest.raises(InputError, match=r"select\.rank_high"):
        check_rank(MODULES, SelectSettings(rank_high=64), ("alors",))


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


def test_calibration_keeps_the_inputs_of_the_blocks_and_runs_them_again(
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
        monkeypatch.setattr(gradients, "blocks_made_again", lambda _: contextlib.nullcontext())
        plain = sketch_gradients(model, modules, few, 64, seed=1)
    assert sum(kept) - few_kept > 3 * few_kept
    for name, sketch in plain.items():
        assert torch.equal(sketch.range_sketch, again[name].range_sketch)
        assert sketch.gradient_snr == again[name].gradient_snr


def test_a_starts_from_the_leading_gradient_directions_of_its_group(
    quantized: Path, outline: Path, prepared: Path, tmp_path: Path
) -> None:
    analyze(Inputs(outline), SnrSettings(), tmp_path / "table")
    settings = SelectSettings(
        rank=4, sketch_size=256, calibration_batches=2, similarity=-1.0, percent=100.0, gradient_init="on"
    )
    (tmp_path / "ranks").mkdir()
    found = select("sgm", quantized, prepared, tmp_path / "table", settings, 1, tmp_path / "ranks")
    starts = load_file(tmp_path / "ranks" / GRADIENT_INIT)
    # With every cosine allowed, all modules of a type share one pair.
    groups = {m.group for m in found.active()}
    assert len(starts) == len(groups) == 7
    members = [m.module for m in found.active() if m.type == "self_attn.q_proj"]
    model, _ = load_four_bit(quantized)
    batches = Collator(0, None).batches(
        load_rows(prepared, "train").shuffle(seed=1), settings.calibration_rows, limit=2
    )
    full = model.dequantize().float()
    weights = [dict(full.named_modules())[name].weight.requires_grad_(True) for name in members]
    mean = torch.stack(
        [torch.stack(torch.autograd.grad(full(**batch).loss, weights)).mean(0) for batch in batches]
    ).mean(0)
    leading = torch.linalg.svd(mean).Vh[:4]
    a = starts[members[0]]
    cosines = torch.linalg.svdvals(a / a.norm(dim=1, keepdim=True) @ leading.T)
    assert cosines.min() > 0.999


def test_groups_are_complete_linkage() -> None:
    # Neighbours are 25 degrees apart: a chain would join all three, but the ends have a cosine of 0.64.
    angles = torch.tensor([0.0, 25.0, 50.0]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    candidates = [m for m in MODULES if m.type == "q"][:3]
    sketches = {m.module: GradientSketch(v, v, 1.0) for m, v in zip(candidates, vectors, strict=True)}
    assert sorted(map(len, group_by_similarity(candidates, sketches, 0.9).groups)) == [1, 2]
    assert sorted(map(len, group_by_similarity(candidates, sketches, 0.64).groups)) == [3]


def test_groups_hold_only_similar_modules_of_one_type() -> None:
    base = torch.eye(4)
    other = torch.ones(4, 4)
    sketches = {
        m.module: GradientSketch(base, base if m.layer < 3 else other, 1.0) for m in MODULES if m.layer < 5
    }
    candidates = [m for m in MODULES if m.module in sketches]
    found = group_by_similarity(candidates, sketches, 0.9)
    assert sorted(map(sorted, found.groups)) == [
        ["m.0.k", "m.1.k", "m.2.k"],
        ["m.0.q", "m.1.q", "m.2.q"],
        ["m.3.k", "m.4.k"],
        ["m.3.q", "m.4.q"],
    ]
    assert found.cosines[0][candidates.index(MODULES[8])] is None
    assert math.isclose(found.cosines[0][3] or 0, 0.5)
