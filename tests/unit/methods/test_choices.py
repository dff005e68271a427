"""Every method's choice on random scores equals a plain reference written here, and budgets hold in every round.

The references use numpy and nothing of the product; shapes differ between types, and within one.
"""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.methods.carry_over import UpdateSpectrum
from spectraqlora.methods.catalogue import METHODS, moving
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores

from tests.modules import first_ranks, modules, parameters

SEEDS = range(12)
SIGNALS = ("spectrum", "energy", "gradient_snr", "combined")


def _members(generator: np.random.Generator) -> list[LinearModule]:
    """Four types of different shapes; a few matrices of a type are wider than the others."""
    layers = int(generator.integers(4, 10))
    members = modules(layers, q=(32, 32), k=(16, 32), up=(96, 32), down=(32, 96))
    return [
        m.model_copy(update={"out_features": 128}) if m.type == "up" and generator.random() < 0.3 else m
        for m in members
    ]


def _scores(members: list[LinearModule], generator: np.random.Generator) -> Scores:
    """Over several orders of magnitude, with ties, some infinite and some missing, as tables hold them."""
    scores: Scores = {}
    for m in members:
        value = float(np.exp(generator.normal(0, 2)))
        if generator.random() < 0.1:
            value = float("inf")
        if generator.random() < 0.1:
            value = 1.0
        if generator.random() > 0.05:
            scores[m.module] = (value, float(np.exp(generator.normal())))
    return scores


def _finite(scores: Scores) -> Scores:
    """The task's signals are finite."""
    return {name: (min(value, 1e6), tie) for name, (value, tie) in scores.items()}


def _sides(members: list[LinearModule]) -> np.ndarray:
    return np.array([m.in_features + m.out_features for m in members])


def _order(indices: list[int], members: list[LinearModule], scores: Scores) -> list[int]:
    known = [i for i in indices if members[i].module in scores]
    value, tie = (
        np.array([scores[members[i].module][place] for i in known], dtype=float) for place in (0, 1)
    )
    return [known[i] for i in np.lexsort((np.arange(len(known)), -tie, -value))] if known else []


def _pools(members: list[LinearModule], scope: str) -> list[list[int]]:
    if scope == "all":
        return [list(range(len(members)))]
    types = list(dict.fromkeys(m.type for m in members))
    return [[i for i, m in enumerate(members) if m.type == kind] for kind in types]


def _top(members: list[LinearModule], scores: Scores, percent: float, scope: str) -> set[int]:
    chosen: set[int] = set()
    for pool in _pools(members, scope):
        order = _order(pool, members, scores)
        if scope == "type":
            chosen |= set(order[: int(np.floor(len(pool) * percent / 100))])
            continue
        left = _sides(members).sum() * percent / 100
        for i in order:
            if _sides(members)[i] <= left:
                chosen.add(i)
                left -= _sides(members)[i]
    return chosen


def _one_rank(members: list[LinearModule], chosen: set[int], rank: int, budget: float) -> list[int]:
    sides = _sides(members)
    if budget:
        rank = min(int(budget * rank * sides.sum() / sides[sorted(chosen)].sum()), 4 * rank)
    return (
        [min(rank, m.in_features, m.out_features) if i in chosen else 0 for i, m in enumerate(members)]
        if budget
        else [rank if i in chosen else 0 for i in range(len(members))]
    )


def _tiers(members: list[LinearModule], scores: Scores, select: SelectSettings) -> list[str]:
    tiers = ["low"] * len(members)
    for pool in _pools(members, select.scope):
        order = _order(pool, members, scores)
        high, rest = (
            round(len(pool) * share / 100)
            for share in (select.high_percent, select.high_percent + select.medium_percent)
        )
        for place, i in enumerate(order[:rest]):
            tiers[i] = "high" if place < high else "medium"
    return tiers


def _amplitudes(members: list[LinearModule], scores: Scores, signal: str) -> np.ndarray:
    pairs = np.array([scores.get(m.module, (0.0, 0.0)) for m in members])
    return pairs[:, 1] if signal == "spectrum" else np.sqrt(pairs[:, 0])


def _rates(
    members: list[LinearModule], ranks: np.ndarray, scores: Scores, select: SelectSettings
) -> np.ndarray:
    signal, rates = _amplitudes(members, scores, select.signal), np.ones(len(members))
    for pool in _pools(members, select.scope):
        trained = [i for i in pool if ranks[i] > 0]
        if not trained:
            continue
        values = signal[trained]
        spread = values.max() - values.min()
        place = (values - values.min()) / spread if spread else np.full(len(values), 0.5)
        rates[trained] = 1 + (select.high_lr - 1) * place
    weight = ranks * _sides(members)
    mean = (weight * rates).sum() / weight.sum()
    return np.where(ranks > 0, rates / mean, 1.0)


def _in_proportion(
    members: list[LinearModule], wanted: np.ndarray, budget: float, highest: int
) -> np.ndarray:
    """Ranks rise one by one in the order in which wanted · scale passes whole numbers, while they are paid for."""
    sides = _sides(members)
    caps = [min(highest, m.in_features, m.out_features) for m in members]
    steps = sorted((k / w, i) for i, w in enumerate(wanted) if w > 0 for k in range(1, caps[i] + 1))
    ranks, left, scale = np.zeros(len(members), dtype=int), budget, np.inf
    for at, i in steps:
        if sides[i] > left:
            scale = at
            break
        ranks[i] += 1
        left -= sides[i]
    while open_ := [
        i for i in range(len(members)) if wanted[i] > 0 and ranks[i] < caps[i] and sides[i] <= left
    ]:
        behind = max(open_, key=lambda i: wanted[i] * scale - ranks[i])
        ranks[behind] += 1
        left -= sides[behind]
    return ranks


@pytest.mark.parametrize("scope", ["type", "all"])
@pytest.mark.parametrize("seed", SEEDS)
def test_first_choices_are_those_of_the_reference(seed: int, scope: str) -> None:
    generator = np.random.default_rng(seed)
    members = _members(generator)
    scores = _scores(members, generator)
    percent, budget = float(generator.uniform(20, 90)), float(generator.choice([0.0, 0.3, 0.7]))
    select = SelectSettings(rank=4, percent=percent, scope=scope, budget=budget, signal="spectrum")
    drawn = random.Random(1)
    chance = {m.module: (drawn.random(), 0.0) for m in members}
    expected = {
        "qlora": set(range(len(members))),
        "hybrid": _top(members, scores, percent, scope),
        "sgm": _top(members, scores, percent, scope),
        "random": _top(members, chance, percent, scope),
    }
    for name, chosen in expected.items():
        ranks = [m.rank for m in first_ranks(name, members, scores, select).modules]
        assert ranks == _one_rank(members, chosen, 4, budget), name


@pytest.mark.parametrize("scope", ["type", "all"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_control_of_half_ranks_costs_what_hybrid_costs_and_no_rank_differs_by_more_than_one(
    seed: int, scope: str
) -> None:
    generator = np.random.default_rng(seed)
    members = _members(generator)
    scores = _scores(members, generator)
    percent, budget = float(generator.uniform(30, 100)), float(generator.choice([0.0, 0.5, 1.0]))
    select = SelectSettings(rank=4, percent=percent, scope=scope, budget=budget, signal="spectrum")
    hybrid = first_ranks("hybrid", members, scores, select)
    control = first_ranks("qlora_half", members, scores, select)
    sides = _sides(members)
    rank = parameters(hybrid, members) // int(sides.sum())
    left, expected = parameters(hybrid, members) - rank * int(sides.sum()), []
    for m, side in zip(members, sides, strict=True):
        expected.append(min(rank + (side <= left), m.in_features, m.out_features))
        left -= side if side <= left else 0
    assert [m.rank for m in control.modules] == expected
    assert 0 <= parameters(hybrid, members) - parameters(control, members) < max(sides)
    assert control.budget >= parameters(control, members)


@pytest.mark.parametrize("scope", ["type", "all"])
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("seed", range(4))
def test_alors_tiers_ranks_and_learning_rates_are_those_of_the_reference(
    seed: int, signal: str, scope: str
) -> None:
    generator = np.random.default_rng(seed)
    members = _members(generator)
    scores = _scores(members, generator)
    if signal != "spectrum":
        scores = _finite(scores)
    high, medium = float(generator.uniform(10, 40)), float(generator.uniform(20, 50))
    for budget in (0.0, 0.4):
        select = SelectSettings(
            rank=4, rank_high=8, rank_low=3, high_percent=high, medium_percent=medium, high_lr=2.5,
            scope=scope, signal=signal, budget=budget,
        )  # fmt: skip
        rank_map = first_ranks("alors", members, scores, select)
        tiers = _tiers(members, scores, select)
        expected = np.array([{"high": 8, "medium": 3, "low": 0}[tier] for tier in tiers])
        if budget:
            wanted = np.where(expected > 0, _amplitudes(members, scores, signal), 0.0)
            expected = _in_proportion(members, wanted, budget * 4 * _sides(members).sum(), 16)
        ranks = [m.rank for m in rank_map.modules]
        assert ranks == expected.tolist()
        trained = [m.tier if m.rank else "low" for m in rank_map.modules]
        assert trained == [tier if rank else "low" for tier, rank in zip(tiers, expected, strict=True)]
        rates = [m.lr_scale for m in rank_map.modules]
        assert rates == pytest.approx(_rates(members, expected, scores, select).tolist())


def _rounds(
    name: str, seed: int, select: SelectSettings, rounds: int = 6
) -> Iterator[tuple[RankMap, RankMap, Scores, dict[str, UpdateSpectrum], list[LinearModule]]]:
    """Pairs of maps that follow each other, with new random scores and updates every round."""
    generator = np.random.default_rng(100 + seed)
    members = _members(generator)
    current = first_ranks(name, members, _finite(_scores(members, generator)), select)
    for _ in range(rounds):
        scores = _finite(_scores(members, generator))
        updates = {
            m.module: UpdateSpectrum(int(generator.integers(0, m.rank + 1)), 1.0, 0.1)
            if generator.random() < 0.6
            else UpdateSpectrum(m.rank, float(m.rank), 0.1)
            for m in current.active()
        }
        after = moving(name).next_ranks(current, members, scores, updates, select)
        yield current, after, scores, updates, members
        current = after


def _trained(rank_map: RankMap, members: list[LinearModule]) -> int:
    sides = {m.module: m.in_features + m.out_features for m in members}
    return sum(m.rank * sides[m.module] for m in rank_map.modules if m.tier not in ("frozen", "frozen-base"))


@pytest.mark.parametrize("scope", ["type", "all"])
@pytest.mark.parametrize("budget", [0.0, 0.35])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.moves])
def test_no_round_trains_more_than_the_budget_or_the_first_round(
    name: str, budget: float, scope: str
) -> None:
    moved = 0
    for seed in SEEDS:
        select = SelectSettings(rank=4, rank_high=8, rank_low=3, scope=scope, budget=budget)
        rounds = list(_rounds(name, seed, select))
        first, members = rounds[0][0], rounds[0][-1]
        limit = int(budget * 4 * _sides(members).sum()) if budget else parameters(first, members)
        assert _trained(first, members) <= limit
        for _, after, *_ in rounds:
            assert _trained(after, members) <= limit
            moved += after.changes != ["nothing moved"]
        assert [after.round for _, after, *_ in rounds] == list(range(2, 2 + len(rounds)))
    assert moved > len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_hybrids_next_choice_is_the_top_of_the_new_scores_while_it_is_paid_for(seed: int) -> None:
    select = SelectSettings(rank=4, scope="all", percent=45)
    for before, after, scores, _, members in _rounds("hybrid", seed, select):
        sides, top = _sides(members), _top(members, scores, 45, "all")
        selected = {i for i, m in enumerate(before.modules) if m.tier == "selected"}
        left = before.budget - 4 * sum(sides[i] for i in selected & top)
        for i in _order(sorted(top - selected), members, scores):
            if 4 * sides[i] <= left:
                left -= 4 * sides[i]
            else:
                top.discard(i)
        assert {i for i, m in enumerate(after.modules) if m.tier == "selected"} == top
        assert {i for i, m in enumerate(after.modules) if m.tier == "frozen"} == {
            i for i, m in enumerate(before.modules) if m.rank
        } - top
        assert {m.rank for m in after.active()} == {4}


@pytest.mark.parametrize("scope", ["type", "all"])
@pytest.mark.parametrize("seed", SEEDS)
def test_alors_grows_what_others_paid_for_and_cuts_nobody_who_uses_what_it_has(seed: int, scope: str) -> None:
    select = SelectSettings(rank=4, rank_high=8, rank_low=3, scope=scope, signal="energy", high_lr=2.0)
    order = ["low", "medium", "high"]
    for before, after, scores, updates, members in _rounds("alors", seed, select):
        tiers = _tiers(members, scores, select)
        paid = earned = asked = 0
        for m, old, new, tier in zip(members, before.modules, after.modules, tiers, strict=True):
            was = {"frozen-base": "low", "frozen": "low"}.get(old.tier, old.tier)
            cost = m.in_features + m.out_features
            trained = [0 if r.tier in ("frozen", "frozen-base") else r.rank for r in (old, new)]
            paid += cost * max(trained[0] - trained[1], 0)
            earned += cost * max(trained[1] - trained[0], 0)
            if tier == "low":
                assert new.tier in ("frozen", "frozen-base") and new.rank == old.rank
                continue
            if was == "low":
                # A frozen adapter comes back with its rank or not at all.
                assert new.rank >= old.rank and (new.tier == tier or new == old)
                continue
            assert new.tier == tier
            used = updates[old.module].energy_rank
            if order.index(tier) < order.index(was):
                assert new.rank == min(old.rank, 3)
            elif order.index(tier) > order.index(was):
                assert old.rank <= new.rank <= max(old.rank, 8)
            elif used >= old.rank:
                ceiling = min(2 * old.rank, 16, m.in_features, m.out_features)
                assert old.rank <= new.rank <= max(ceiling, old.rank)
                asked += cost * (max(ceiling, old.rank) - new.rank)
            elif 0 < used <= old.rank // 2:
                assert new.rank == used
            else:
                assert new.rank == old.rank
        spare = before.budget - _trained(before, members)
        assert earned <= paid + spare
        # What is left over pays for no further rank that somebody asked for.
        if asked:
            left = before.budget - _trained(after, members)
            assert left < max(m.in_features + m.out_features for m in members)
        ranks = np.array([0 if r.tier in ("frozen", "frozen-base") else r.rank for r in after.modules])
        rates = _rates(members, ranks, scores, select)
        assert [r.lr_scale for r in after.modules] == pytest.approx(rates.tolist())
