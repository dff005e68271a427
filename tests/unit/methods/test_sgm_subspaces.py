"""sgm by subspace: its choice on random sketches equals a plain reference, and every parameter is counted.

The reference uses numpy and nothing of the product.
"""

import numpy as np
import pytest
import torch
from spectraqlora.artifacts import LinearModule, RankMap, SideOverlap
from spectraqlora.methods.sgm import group_by_overlap
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.gradients import GradientSketch, starting_directions
from spectraqlora.signals.scores import Scores
from spectraqlora.signals.subspaces import chance_overlap, side_overlaps

from tests.modules import first_ranks, modules, parameters

WIDTH, RANK, SKETCH = 32, 4, 8
Groups = set[tuple[frozenset[str], str]]


def _members(layers: int) -> list[LinearModule]:
    """q faces the residual stream on both sides, o and down with their output, kv_b not at all."""
    attention = {"q": (WIDTH, WIDTH), "k": (16, WIDTH), "v": (16, WIDTH), "o": (WIDTH, 48), "kv_b": (40, 12)}
    mlp = {"up": (96, WIDTH), "gate": (96, WIDTH), "down": (WIDTH, 96)}
    named = {f"attn.{name}": size for name, size in attention.items()}
    return modules(layers, **named, **{f"mlp.{name}": size for name, size in mlp.items()})


def _part(name: str) -> str:
    """Attention or MLP, of `m.<layer>.<part>.<matrix>`."""
    return name.split(".")[2]


def _sketches(members: list[LinearModule], generator: np.random.Generator) -> dict[str, GradientSketch]:
    """Of every side a common subspace that drifts with the layer, and noise of another strength in every module."""
    drift = generator.normal(size=(2, 2, WIDTH, SKETCH))

    def sketch(side: int, features: int, info: LinearModule) -> torch.Tensor:
        noise = generator.normal(size=(features, SKETCH)) * generator.uniform(0, 1.5)
        if features == WIDTH:
            noise += drift[side, 0] + 0.15 * info.layer * drift[side, 1]
        return torch.tensor(noise * np.linspace(2, 1, SKETCH), dtype=torch.float32)

    return {
        m.module: GradientSketch(
            sketch(0, m.in_features, m),
            torch.eye(SKETCH),
            1.0,
            sketch(1, m.out_features, m) if m.out_features == WIDTH else None,
        )
        for m in members
        if generator.random() > 0.05
    }


def _scores(members: list[LinearModule], generator: np.random.Generator) -> Scores:
    return {m.module: (float(generator.normal()), 0.0) for m in members}


def _basis(sketch: torch.Tensor | None) -> np.ndarray:
    assert sketch is not None
    return np.linalg.svd(sketch.numpy().astype(float), full_matrices=False)[0][:, :RANK]


def _reference_overlaps(
    chosen: list[LinearModule], sketches: dict[str, GradientSketch]
) -> dict[str, tuple[list[str], np.ndarray]]:
    """Modules and their overlaps, by side."""
    sides = {}
    for side in ("input", "output"):
        bases = {
            m.module: _basis(
                sketches[m.module].range_sketch if side == "input" else sketches[m.module].output_sketch
            )
            for m in chosen
            if m.module in sketches and (m.in_features if side == "input" else m.out_features) == WIDTH
        }
        overlap = [[np.linalg.norm(a.T @ b) ** 2 / RANK for b in bases.values()] for a in bases.values()]
        sides[side] = list(bases), np.array(overlap)
    return sides


def _reference_groups(
    layer_of: dict[str, int],
    sides: dict[str, tuple[list[str], np.ndarray, float]],
    threshold: float,
    layers: int,
    within: str = "part",
) -> Groups:
    """Pairs merge, the most similar first, while every pair of the merged group is similar and near."""
    best: dict[str, tuple[float, str]] = {}
    for side, (names, overlap, chance) in sides.items():
        for i, name in enumerate(names):
            others = [
                overlap[i, j]
                for j, other in enumerate(names)
                if i != j
                and abs(layer_of[name] - layer_of[other]) < layers
                and (within == "block" or _part(name) == _part(other))
                and overlap[i, j] >= threshold
                and overlap[i, j] > chance
            ]
            if others and max(others) > best.get(name, (-1.0, ""))[0]:
                best[name] = max(others), side
    groups: Groups = set()
    for side, (names, overlap, chance) in sides.items():
        clusters = [[i] for i, name in enumerate(names) if best.get(name, (0, ""))[1] == side]
        while True:
            joinable = []
            for x in range(len(clusters)):
                for y in range(x):
                    pairs = [(i, j) for i in clusters[x] for j in clusters[y]]
                    worst = min(overlap[i, j] for i, j in pairs)
                    near = all(
                        abs(layer_of[names[i]] - layer_of[names[j]]) < layers
                        and (within == "block" or _part(names[i]) == _part(names[j]))
                        for i, j in pairs
                    )
                    if near and worst >= threshold and worst > chance:
                        joinable.append((worst, x, y))
            if not joinable:
                break
            _, x, y = max(joinable)
            clusters[y] += clusters.pop(x)
        shared = "A" if side == "input" else "B"
        groups |= {(frozenset(names[i] for i in c), shared) for c in clusters if len(c) > 1}
    return groups


def _groups(rank_map: RankMap) -> Groups:
    found: dict[int, tuple[set[str], str]] = {}
    for entry in rank_map.active():
        if entry.group is not None:
            found.setdefault(entry.group, (set(), entry.shared))[0].add(entry.module)
            assert found[entry.group][1] == entry.shared
    return {(frozenset(names), shared) for names, shared in found.values()}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_groups_and_ranks_are_those_of_the_reference(seed: int, layers: int) -> None:
    generator = np.random.default_rng(seed)
    members = _members(int(generator.integers(4, 8)))
    sketches, scores = _sketches(members, generator), _scores(members, generator)
    threshold, percent = float(generator.uniform(0.2, 0.8)), float(generator.uniform(50, 100))
    within, both = str(generator.choice(["part", "block"])), str(generator.choice(["input", "both"]))
    select = SelectSettings(
        rank=RANK,
        percent=percent,
        overlap=threshold,
        group_layers=layers,
        group_within=within,
        group_sides=both,
    )
    rank_map = first_ranks("sgm", members, scores, select, sketches)

    chosen = []
    for kind in dict.fromkeys(m.type for m in members):
        pool = sorted((m for m in members if m.type == kind), key=lambda m: -scores[m.module][0])
        chosen += pool[: int(len(pool) * percent / 100)]
    assert {m.module for m in rank_map.active()} == {m.module for m in chosen}
    assert rank_map.similarity is not None
    expected = _reference_overlaps([m for m in members if m in chosen], sketches)
    sides = {}
    for side in rank_map.similarity.sides:
        names, overlap = expected[side.side]
        assert side.modules == names
        np.testing.assert_allclose(side.overlaps, overlap, atol=2e-4)
        sides[side.side] = names, np.array(side.overlaps), side.chance
    layer_of = {m.module: m.layer for m in members}
    groups = _reference_groups(
        layer_of, sides if both == "both" else {"input": sides["input"]}, threshold, layers, within
    )
    assert _groups(rank_map) == groups
    assert {m.rank for m in rank_map.active()} == {RANK}
    saved = sum((len(names) - 1) * RANK * WIDTH for names, _ in groups)
    alone = RANK * sum(m.in_features + m.out_features for m in chosen)
    assert parameters(rank_map, members) == alone - saved == rank_map.budget

    # What was saved buys rank: the next one would cost more than hybrid.
    spent = first_ranks("sgm", members, scores, select.model_copy(update={"spend_savings": True}), sketches)
    rank = min(max(m.rank for m in spent.active()), 4 * RANK)
    assert _groups(spent) == groups and rank == min(alone // ((alone - saved) // RANK), 4 * RANK)
    assert parameters(spent, members) <= alone
    for names, _ in groups:
        assert len({m.rank for m in spent.active() if m.module in names}) == 1
    budget = float(generator.uniform(0.2, 0.9))
    paid = first_ranks("sgm", members, scores, select.model_copy(update={"budget": budget}), sketches)
    assert parameters(paid, members) <= budget * RANK * sum(m.in_features + m.out_features for m in members)


def test_the_reference_finds_groups_on_both_sides_of_every_size() -> None:
    sizes: set[tuple[int, str]] = set()
    for seed in range(8):
        generator = np.random.default_rng(seed)
        members = _members(6)
        select = SelectSettings(rank=RANK, percent=100, overlap=0.4, group_sides="both")
        rank_map = first_ranks(
            "sgm", members, _scores(members, generator), select, _sketches(members, generator)
        )
        sizes |= {(min(len(names), 4), shared) for names, shared in _groups(rank_map)}
    assert sizes >= {(2, "A"), (3, "A"), (4, "A"), (2, "B")}


def test_subspaces_at_random_share_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    members = [m for m in _members(8) if m.type != "attn.kv_b"]

    def noise(features: int) -> torch.Tensor:
        return torch.randn(features, SKETCH, generator=generator)

    sketches = {
        m.module: GradientSketch(noise(m.in_features), torch.eye(SKETCH), 1.0, noise(m.out_features))
        for m in members
    }
    select = SelectSettings(rank=RANK, percent=100, overlap=0.0, group_layers=8, group_sides="both")
    rank_map = first_ranks("sgm", members, {m.module: (1.0, 0.0) for m in members}, select, sketches)
    assert rank_map.similarity is not None
    shared = sum(len(group) for group in rank_map.similarity.groups)
    pairs = sum(len(s.modules) * (len(s.modules) - 1) // 2 for s in rank_map.similarity.sides)
    # Chance is the largest of 200 draws: of 1056 pairs, half of them of one part, a few are above it.
    assert pairs == 1056 and shared <= 16


def test_chance_is_measured_and_near_what_theory_expects() -> None:
    expected = [np.linalg.norm(np.linalg.qr(np.random.default_rng(i).normal(size=(64, 8)))[0][:8]) ** 2 / 8
                for i in range(200)]  # fmt: skip
    assert chance_overlap(64, 8) == pytest.approx(max(expected), rel=0.15)
    assert chance_overlap(64, 8) > 8 / 64
    assert chance_overlap(16, 16) == 1.0, "everything overlaps with everything: no pair is above chance"


def test_what_reads_one_input_and_neighbours_share_and_distant_layers_and_other_parts_do_not() -> None:
    members = [m for m in _members(4) if m.type != "attn.kv_b"]
    torch.manual_seed(0)
    same_in, same_out = torch.randn(WIDTH, SKETCH), torch.randn(WIDTH, SKETCH)
    sketches = {
        m.module: GradientSketch(
            same_in if m.in_features == WIDTH else torch.randn(m.in_features, SKETCH),
            torch.eye(SKETCH),
            1.0,
            same_out if m.type in ("attn.o", "mlp.down") else torch.randn(m.out_features, SKETCH),
        )
        for m in members
    }
    everything = {m.module: (1.0, 0.0) for m in members}
    for layers in (1, 2):
        select = SelectSettings(rank=RANK, percent=100, group_layers=layers, group_sides="both")
        groups = _groups(first_ranks("sgm", members, everything, select, sketches))
        kinds = {"A": ({"q", "k", "v"}, {"up", "gate"}), "B": ({"o"}, {"down"})}
        # One layer has one o and one down, which are of different parts and so share nothing.
        assert len(groups) == (8 if layers == 1 else 2 * 4)
        for names, shared in groups:
            assert {name.split(".")[3] for name in names} in kinds[shared]
            spread = sorted({int(name.split(".")[1]) for name in names})
            assert len(spread) == layers and spread[-1] - spread[0] == layers - 1
    select = SelectSettings(rank=RANK, percent=100, group_layers=1, group_within="block", group_sides="both")
    groups = _groups(first_ranks("sgm", members, everything, select, sketches))
    kinds = {"A": {"q", "k", "v", "up", "gate"}, "B": {"o", "down"}}
    assert len(groups) == 2 * 4 and all({n.split(".")[3] for n in names} == kinds[s] for names, s in groups)


def test_a_pair_at_the_threshold_is_similar_and_one_at_chance_is_not() -> None:
    members = modules(1, q=(WIDTH, WIDTH), k=(16, WIDTH))
    names = [m.module for m in members]

    def groups(overlap: float, chance: float, threshold: float) -> int:
        matrix = [[1.0, overlap], [overlap, 1.0]]
        side = SideOverlap(side="input", modules=names, overlaps=matrix, chance=chance)
        return len(group_by_overlap(members, [side], SelectSettings(overlap=threshold, group_layers=1)))

    assert groups(0.3, 0.1, 0.3) == 1
    assert groups(0.3, 0.1, 0.31) == groups(0.3, 0.3, 0.1) == 0


def test_a_group_starts_from_the_leading_directions_of_its_gradients_stacked() -> None:
    members = modules(2, q=(WIDTH, WIDTH), up=(96, WIDTH), down=(WIDTH, 96))
    generator = np.random.default_rng(4)
    # Gradients whose sketches are exact: as many columns as they have directions.
    gradients = {m.module: generator.normal(size=(m.out_features, m.in_features)) for m in members}
    sketches = {
        name: GradientSketch(torch.tensor(g.T).float(), torch.eye(4), 1.0, torch.tensor(g).float())
        for name, g in gradients.items()
    }
    select = SelectSettings(rank=RANK)
    rank_map = first_ranks("qlora", members, {}, select)
    shared = {"m.0.q": (0, "A"), "m.0.up": (0, "A"), "m.0.down": (1, "B"), "m.1.down": (1, "B")}
    rank_map.modules = [
        m.model_copy(update=dict(zip(("group", "shared"), shared[m.module], strict=True)))
        if m.module in shared
        else m
        for m in rank_map.modules
    ]
    starts = starting_directions(sketches, rank_map)
    assert starts.keys() == {"m.0.q", "m.1.q", "m.1.up", "m.0.down.lora_B"}
    rows = np.linalg.svd(np.concatenate([gradients["m.0.q"], gradients["m.0.up"]]))[2][:RANK]
    columns = np.linalg.svd(np.concatenate([gradients["m.0.down"], gradients["m.1.down"]], axis=1))[0]
    for start, exact in ((starts["m.0.q"].T, rows.T), (starts["m.0.down.lora_B"], columns[:, :RANK])):
        assert np.linalg.norm(start.numpy(), axis=0) == pytest.approx(3**-0.5)
        assert np.linalg.svd(3**0.5 * start.numpy().T @ exact)[1] == pytest.approx(1.0, abs=1e-4)


def test_overlaps_need_two_modules_that_face_the_stream_and_a_sketch_of_that_side() -> None:
    members = modules(2, q=(16, WIDTH), down=(WIDTH, 96))
    sketch = GradientSketch(torch.randn(WIDTH, SKETCH), torch.eye(SKETCH), 1.0)
    other = GradientSketch(torch.randn(96, SKETCH), torch.eye(SKETCH), 1.0)
    without = {m.module: sketch if m.type == "q" else other for m in members}
    (inputs,) = side_overlaps(members, members, without, RANK)
    assert (inputs.side, inputs.modules) == ("input", ["m.0.q", "m.1.q"])
    assert side_overlaps(members, members[:1], without, RANK) == []
