"""alors: tiers, learning rates and budgets; what the signal and the update's spectrum move."""

import pytest
from spectraqlora.artifacts import RankMap
from spectraqlora.errors import InputError
from spectraqlora.methods.carry_over import UpdateSpectrum
from spectraqlora.methods.catalogue import method, moving
from spectraqlora.settings import SelectSettings

from tests.modules import first_ranks, modules, parameters

MODULES = modules(8, q=(32, 32), k=(32, 32))
SCORES = {m.module: (float(m.layer), 0.0) for m in MODULES}
MIXED = modules(8, q=(32, 32), up=(96, 32))
ONE_TYPE = modules(10, up=(32, 16))
FALLING = {m.module: (10.0 - m.layer, 0.0) for m in ONE_TYPE}
SETTINGS = SelectSettings(rank=4, rank_high=4, rank_low=2)
FULL = {m.module: UpdateSpectrum(4, 4.0, 0.1) for m in ONE_TYPE}


def _first(settings: SelectSettings = SETTINGS) -> RankMap:
    return first_ranks("alors", ONE_TYPE, FALLING, settings)


def _ranks(rank_map: RankMap) -> list[int]:
    return [m.rank for m in rank_map.modules]


def test_tiers_ranks_and_mean_learning_rate() -> None:
    settings = SelectSettings(high_percent=25, medium_percent=50, rank_high=16, rank_low=4, high_lr=2)
    rank_map = first_ranks("alors", MODULES, SCORES, settings)
    assert [m.rank for m in rank_map.modules if m.type == "q"] == [0, 0, 4, 4, 4, 4, 16, 16]
    assert all(m.alpha == 2 * m.rank for m in rank_map.modules)
    total = sum(m.rank for m in rank_map.active())
    assert sum(m.rank * m.lr_scale for m in rank_map.active()) / total == pytest.approx(1)
    # Signals 2 to 7: from 1 to 2 in proportion to their square roots.
    rates = [rank_map.modules[layer].lr_scale for layer in range(2, 8)]
    middle = 1 + (5**0.5 - 2**0.5) / (7**0.5 - 2**0.5)
    assert rates[5] == pytest.approx(2 * rates[0]) and rates[3] == pytest.approx(middle * rates[0])
    assert len({round(rate, 6) for rate in rates}) == 6


def test_a_budget_is_shared_in_proportion_to_the_signal() -> None:
    settings = SelectSettings(signal="spectrum", rank=8, budget=0.5, high_percent=50, medium_percent=50)
    scores = {m.module: (0.0, 1.0 + m.layer) for m in MIXED}
    rank_map = first_ranks("alors", MIXED, scores, settings)
    ranks = {m.module: m.rank for m in rank_map.modules}
    for kind in ("q", "up"):
        shares = [ranks[f"m.{i}.{kind}"] / (1 + i) for i in range(8)]
        middle = sum(ranks.values()) / sum(1.0 + m.layer for m in MIXED)
        assert all(abs(one - middle) <= 1 / (1 + i) for i, one in enumerate(shares))


def test_tiers_above_100_percent_and_ranks_too_large_are_refused() -> None:
    with pytest.raises(InputError, match=r"select\.rank_high: '64': expected at most 32"):
        method("alors").check(MODULES, SelectSettings(rank_high=64))
    with pytest.raises(InputError, match=r"select\.rank_low"):
        method("alors").check(MODULES, SelectSettings(rank_low=64))
    with pytest.raises(InputError, match=r"select\.medium_percent: '60.0': expected at most 40,"):
        method("alors").check(MODULES, SelectSettings(high_percent=60, medium_percent=60))
    method("alors").check(MODULES, SelectSettings(rank=64, high_percent=60, medium_percent=40))


def test_idle_ranks_are_taken_back_and_pay_for_those_that_use_all_of_theirs_the_best_first() -> None:
    before = _first()
    assert _ranks(before) == [4, 4, 4, 2, 2, 2, 2, 0, 0, 0]
    updates = {m.module: UpdateSpectrum(3, 3.0, 0.1) for m in ONE_TYPE[:3]}
    updates |= {m.module: UpdateSpectrum(2, 2.0, 0.1) for m in ONE_TYPE[3:7]}
    updates[ONE_TYPE[0].module] = UpdateSpectrum(1, 1.0, 0.1)
    after = moving("alors").next_ranks(before, ONE_TYPE, FALLING, updates, SETTINGS)
    assert _ranks(after) == [1, 4, 4, 3, 3, 3, 2, 0, 0, 0]
    assert after.changes == [
        "m.0.up: its update uses 1 of 4 directions, rank 4 to 1",
        *(f"m.{layer}.up: its update uses all 2 directions, rank 2 to 3" for layer in (3, 4, 5)),
    ]
    assert parameters(after, ONE_TYPE) == parameters(before, ONE_TYPE) == before.budget


def test_where_nobody_pays_nobody_grows() -> None:
    after = moving("alors").next_ranks(_first(), ONE_TYPE, FALLING, FULL, SETTINGS)
    assert after.changes == ["nothing moved"] and _ranks(after) == _ranks(_first())


def test_what_rises_is_served_before_what_uses_all_of_its_rank() -> None:
    """m.3 becomes high and m.2 medium: the two directions that one gives are the two that the other asks for."""
    scores = FALLING | {"m.3.up": (8.5, 0.0)}
    after = moving("alors").next_ranks(_first(), ONE_TYPE, scores, FULL, SETTINGS)
    assert _ranks(after) == [4, 4, 2, 4, 2, 2, 2, 0, 0, 0]
    assert after.changes == [
        "m.2.up: its gradient energy moves it from high to medium, rank 4 to 2",
        "m.3.up: its gradient energy moves it from medium to high, rank 2 to 4",
    ]


def test_a_frozen_adapter_is_trained_again_with_its_rank_or_not_at_all() -> None:
    away = FALLING | {"m.0.up": (0.0, 0.0)}
    second = moving("alors").next_ranks(_first(), ONE_TYPE, away, {}, SETTINGS)
    assert (second.modules[0].tier, second.modules[0].rank) == ("frozen", 4)
    third = moving("alors").next_ranks(second, ONE_TYPE, FALLING, {}, SETTINGS)
    assert (third.modules[0].tier, third.modules[0].rank) == ("high", 4)
    poor = second.model_copy(update={"budget": 1})
    still = moving("alors").next_ranks(poor, ONE_TYPE, FALLING, {}, SETTINGS)
    assert (still.modules[0].tier, still.modules[0].rank) == ("frozen", 4)


def test_the_signal_of_the_updated_weights_decides_first() -> None:
    scores = FALLING | {"m.9.up": (100.0, 0.0), "m.0.up": (0.0, 0.0)}
    after = moving("alors").next_ranks(_first(), ONE_TYPE, scores, FULL, SETTINGS)
    tiers = [m.tier for m in after.modules]
    assert (tiers[9], after.modules[9].rank) == ("high", 4)
    assert (tiers[0], after.modules[0].rank) == ("frozen", 4)
    assert "m.9.up: its gradient energy moves it from low to high, rank 0 to 4" in after.changes
    assert "m.0.up: its gradient energy moves it from high to low, its adapter stays frozen" in after.changes
    trained = [m for m in after.active() if m.tier != "frozen"]
    mean = sum(m.rank * m.lr_scale for m in trained) / sum(m.rank for m in trained)
    assert mean == pytest.approx(1)


def test_no_rank_doubles_beyond_its_ceiling_or_the_matrix() -> None:
    settings = SelectSettings(rank=4, rank_high=8, rank_low=2)
    rich = _first(settings).model_copy(update={"budget": 10**6})
    full = {m.module: UpdateSpectrum(m.rank, 1.0, 0.1) for m in rich.active()}
    twice = moving("alors").next_ranks(rich, ONE_TYPE, FALLING, full, settings)
    # Sides of 16: twice rank_high is the ceiling, and the matrix's.
    assert _ranks(twice)[:4] == [16, 16, 16, 4]
    full = {m.module: UpdateSpectrum(m.rank, 1.0, 0.1) for m in twice.active()}
    assert _ranks(moving("alors").next_ranks(twice, ONE_TYPE, FALLING, full, settings))[:4] == [16, 16, 16, 8]
    low = SelectSettings(rank=4, rank_high=3, rank_low=2)
    rich = _first(low).model_copy(update={"budget": 10**6})
    for _ in range(3):
        full = {m.module: UpdateSpectrum(m.rank, 1.0, 0.1) for m in rich.active()}
        rich = moving("alors").next_ranks(rich, ONE_TYPE, FALLING, full, low)
    assert max(_ranks(rich)) == 6


def test_moves_stay_within_the_budget() -> None:
    settings = SETTINGS.model_copy(update={"budget": 0.5})
    budget = 0.5 * parameters(first_ranks("qlora", ONE_TYPE, {}, SETTINGS), ONE_TYPE)
    before = _first(settings)
    after = moving("alors").next_ranks(before, ONE_TYPE, FALLING, FULL, settings)
    for rank_map in (before, after):
        assert 0.8 * budget <= parameters(rank_map, ONE_TYPE) <= budget
