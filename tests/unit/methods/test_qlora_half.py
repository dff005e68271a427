"""qlora_half: hybrid's parameters on every matrix, hybrid's start, and never the winner."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import method
from spectraqlora.settings import SelectSettings, Settings
from spectraqlora.steps.compare.leaderboard import winning_method

from tests.modules import first_ranks, modules, parameters
from tests.unit.results import evaluation

MODULES = modules(8, q=(32, 32), up=(96, 32))
SCORES = {m.module: (float(m.layer), 0.0) for m in MODULES}


def test_half_of_the_matrices_is_half_of_the_rank_everywhere() -> None:
    settings = SelectSettings(rank=8, percent=50)
    control = first_ranks("qlora_half", MODULES, SCORES, settings)
    assert {m.rank for m in control.modules} == {4} and {m.tier for m in control.modules} == {"all"}
    assert {m.alpha for m in control.modules} == {8.0}
    hybrid = first_ranks("hybrid", MODULES, SCORES, settings)
    assert parameters(control, MODULES) == parameters(hybrid, MODULES) == control.budget


def test_what_a_whole_rank_leaves_over_goes_to_the_first_matrices() -> None:
    """Three of eight matrices of a type at rank 8: three ranks everywhere. At rank 4: one and a half."""
    assert {
        m.rank for m in first_ranks("qlora_half", MODULES, SCORES, SelectSettings(rank=8, percent=40)).modules
    } == {3}
    control = first_ranks("qlora_half", MODULES, SCORES, SelectSettings(rank=4, percent=40))
    ranks = [m.rank for m in control.modules]
    assert set(ranks) == {1, 2} and ranks == sorted(ranks, reverse=True)
    assert 0 <= 3 * 4 * (64 + 128) - parameters(control, MODULES) < 128


@pytest.mark.parametrize("values", [{"signal": "spectrum"}, {"signal": "energy"}, {"gradient_init": "on"}])
def test_it_starts_as_hybrid_does(values: dict) -> None:
    settings = SelectSettings(**values)
    assert method("qlora_half").measures_gradients(settings) == method("hybrid").measures_gradients(settings)


def test_what_hybrid_refuses_is_refused() -> None:
    with pytest.raises(InputError, match=r"select\.rank: '64': expected at most 32"):
        method("qlora_half").check(MODULES, SelectSettings(rank=64))
    with pytest.raises(InputError, match=r"select\.percent: '5.0'"):
        first_ranks("qlora_half", MODULES, SCORES, SelectSettings(percent=5))


def test_it_is_part_of_the_default_comparison_and_never_its_winner() -> None:
    assert "qlora_half" in Settings().methods
    best, other = evaluation("qlora_half", [1.0, 2.0], 10), evaluation("hybrid", [2.0, 3.0], 20)
    assert winning_method([best, other]) == "hybrid"
