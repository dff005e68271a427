"""Shares, budgets and limits that all methods share."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import method
from spectraqlora.methods.ranks import allot, cost
from spectraqlora.settings import SelectSettings

from tests.modules import first_ranks, modules, parameters

MIXED = modules(8, q=(32, 32), up=(96, 32))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_budget_is_spent_and_not_overspent(share: float) -> None:
    settings = SelectSettings(rank=8, rank_high=8, rank_low=4, budget=share)
    total = parameters(first_ranks("qlora", MIXED, {}, SelectSettings(rank=8)), MIXED)
    scores = {m.module: (1.0 + m.layer, 1.0 + m.layer) for m in MIXED}
    for name in ("qlora", "hybrid", "alors"):
        spent = parameters(first_ranks(name, MIXED, scores, settings), MIXED)
        # One rank for all leaves up to a rank's worth over; alors spends to the last whole rank of a module.
        left = total / 8 if name != "alors" else max(map(cost, MIXED))
        assert share * total - left < spent <= share * total


def test_a_budget_below_rank_1_is_refused() -> None:
    with pytest.raises(InputError, match=r"select\.budget: '0.1': expected .*rank 1 on 16 adapters"):
        first_ranks("qlora", MIXED, {}, SelectSettings(rank=8, budget=0.1))


def test_allotted_ranks_follow_the_wishes_and_their_caps() -> None:
    three = modules(3, q=(4, 4))
    # 8 parameters a rank: 12 ranks in all, 1 : 2 : 9, but a matrix of side 4 has no rank above 4.
    wanted = {"m.0.q": 1.0, "m.1.q": 2.0, "m.2.q": 9.0}
    assert allot(wanted, three, 8 * 12, 16) == {"m.0.q": 4, "m.1.q": 4, "m.2.q": 4}
    assert allot(wanted, three, 8 * 6, 16) == {"m.0.q": 1, "m.1.q": 1, "m.2.q": 4}
    assert allot({}, three, 8 * 6, 16) == {}


def test_a_rank_above_the_smallest_side_is_refused_for_those_who_use_it() -> None:
    for name in ("qlora", "hybrid", "sgm", "random"):
        with pytest.raises(
            InputError, match=r"select\.rank: '64': expected at most 32, the smallest side of m\.0"
        ):
            method(name).check(MIXED, SelectSettings(rank=64, rank_high=8))
        method(name).check(MIXED, SelectSettings(rank=32, rank_high=64))
