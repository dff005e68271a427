"""sgm: which modules share a pair, and what that pays for."""

import math

import torch
from spectraqlora.artifacts import RankMap
from spectraqlora.methods.sgm import group_by_similarity
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.gradients import GradientSketch

from tests.modules import first_ranks, modules, parameters

MODULES = modules(8, q=(32, 32), k=(32, 32))
MIXED = modules(8, q=(32, 32), up=(96, 32))


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
    similarity = group_by_similarity(candidates, sketches, 0.9)
    assert sorted(map(sorted, similarity.groups)) == [
        ["m.0.k", "m.1.k", "m.2.k"],
        ["m.0.q", "m.1.q", "m.2.q"],
        ["m.3.k", "m.4.k"],
        ["m.3.q", "m.4.q"],
    ]
    assert similarity.cosines[0][candidates.index(MODULES[8])] is None
    assert math.isclose(similarity.cosines[0][3] or 0, 0.5)


def test_a_group_pays_for_its_pair_once() -> None:
    settings = SelectSettings(rank=8, percent=100, budget=0.5, similarity_of="gradient", similarity=0.9)
    scores = {m.module: (1.0, 0.0) for m in MIXED}
    # All q point the same way, every up another way.
    direction = {m.module: 0 if m.type == "q" else 1 + m.layer for m in MIXED}
    sketches = {
        name: GradientSketch(torch.eye(9)[index], torch.eye(9)[index], 1.0)
        for name, index in direction.items()
    }
    alone = first_ranks("sgm", MIXED, scores, settings)
    shared = first_ranks("sgm", MIXED, scores, settings, sketches)
    assert {m.group for m in alone.modules} == {None} and alone.similarity is None
    assert len({m.group for m in shared.modules if m.type == "q"}) == 1
    assert len({m.group for m in shared.modules}) == 9
    assert max(m.rank for m in shared.modules) > max(m.rank for m in alone.modules)
    total = parameters(first_ranks("qlora", MIXED, {}, SelectSettings(rank=8)), MIXED)
    assert parameters(shared, MIXED) <= 0.5 * total


def test_only_hybrids_selection_is_grouped_and_what_has_no_sketch_stays_alone() -> None:
    settings = SelectSettings(rank=8, percent=50, similarity_of="gradient", similarity=-1.0)
    scores = {m.module: (float(m.layer), 0.0) for m in MODULES}
    sketches = {
        m.module: GradientSketch(torch.eye(4), torch.eye(4), 1.0) for m in MODULES if m.module != "m.7.q"
    }
    rank_map = first_ranks("sgm", MODULES, scores, settings, sketches)
    groups = {m.module: m.group for m in rank_map.active()}
    assert groups.keys() == {m.module for m in first_ranks("hybrid", MODULES, scores, settings).active()}
    assert groups.pop("m.7.q") is None
    assert {name: group for name, group in groups.items() if name.endswith("q")} == dict.fromkeys(
        ("m.4.q", "m.5.q", "m.6.q"), groups["m.4.q"]
    )
    assert rank_map.similarity is not None and rank_map.similarity.modules == list(groups)


def test_the_similarity_is_stored_beside_the_map_and_read_with_it(tmp_path) -> None:
    scores = {m.module: (float(m.layer), 0.0) for m in MODULES}
    sketches = {m.module: GradientSketch(torch.eye(4), torch.eye(4), 1.0) for m in MODULES}
    rank_map = first_ranks("sgm", MODULES, scores, SelectSettings(rank=2), sketches)
    rank_map.write(tmp_path)
    assert RankMap.read(tmp_path) == rank_map
    assert {path.name for path in tmp_path.iterdir()} == {"rank_map.json", "similarity.json"}
    assert "similarity" not in (rank_map.model_dump(mode="json"))
