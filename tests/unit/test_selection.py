"""Rank maps: counts, tiers, learning rates; gradients and groups."""

import math
from pathlib import Path

import pytest
import torch
from spectraqlora.artifacts import LinearModule, QuantizedModel
from spectraqlora.errors import InputError
from spectraqlora.gradients import GradientSketch, sketch_gradients
from spectraqlora.models import dequantized_weight, load_quantized
from spectraqlora.rows import Collator, load_rows
from spectraqlora.select_layers.grouping import group_by_similarity
from spectraqlora.selection import check_rank, rank_map
from spectraqlora.settings import SelectSettings

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
    model, _ = load_quantized(quantized)
    modules = QuantizedModel.read(quantized).modules
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
