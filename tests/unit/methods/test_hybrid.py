"""hybrid: the top share of every type, and what enters and leaves it."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import moving
from spectraqlora.settings import SelectSettings

from tests.modules import first_ranks, modules, parameters

MODULES = modules(8, q=(32, 32), k=(32, 32))
SCORES = {m.module: (float(m.layer), 0.0) for m in MODULES}
ONE_TYPE = modules(10, up=(32, 16))
FALLING = {m.module: (10.0 - m.layer, 0.0) for m in ONE_TYPE}
SETTINGS = SelectSettings(rank=4)


def test_the_top_share_of_every_type_is_taken() -> None:
    rank_map = first_ranks("hybrid", MODULES, SCORES, SelectSettings(percent=25))
    assert {m.module for m in rank_map.active()} == {"m.6.q", "m.7.q", "m.6.k", "m.7.k"}
    assert [m.score for m in rank_map.modules] == [SCORES[m.module][0] for m in MODULES]


def test_modules_without_a_score_are_never_selected() -> None:
    scores = {name: value for name, value in SCORES.items() if name != "m.7.q"}
    rank_map = first_ranks("hybrid", MODULES, scores, SelectSettings(percent=100))
    assert len(rank_map.active()) == 15 and "m.7.q" not in {m.module for m in rank_map.active()}


def test_a_share_that_selects_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"select\.percent: '5.0'.*for hybrid"):
        first_ranks("hybrid", MODULES, SCORES, SelectSettings(percent=5))


def test_modules_that_enter_get_an_adapter_and_those_that_leave_are_frozen() -> None:
    before = first_ranks("hybrid", ONE_TYPE, FALLING, SETTINGS)
    assert [m.tier for m in before.modules] == ["selected"] * 5 + ["frozen-base"] * 5
    scores = FALLING | {"m.9.up": (100.0, 0.0)}
    after = moving("hybrid").next_ranks(before, ONE_TYPE, scores, {}, SETTINGS)
    assert after.modules[4].tier == "frozen" and after.modules[4].rank == 4
    assert after.modules[9].tier == "selected" and after.modules[9].rank == 4
    assert after.changes == [
        "m.4.up: leaves the top set by its gradient energy, its adapter stays frozen",
        "m.9.up: enters the top set by its gradient energy",
    ]
    assert after.round == 2
    same = moving("hybrid").next_ranks(before, ONE_TYPE, FALLING, {}, SETTINGS)
    assert same.changes == ["nothing moved"] and same.modules == before.modules


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        ("spectrum", "SNR"),
        ("energy", "gradient energy"),
        ("gradient_snr", "gradient SNR"),
        ("combined", "SNR and gradient energy"),
    ],
)
def test_a_move_is_named_by_the_signal_that_moved_it(signal: str, words: str) -> None:
    settings = SelectSettings(rank=4, signal=signal)
    before = first_ranks("hybrid", ONE_TYPE, FALLING, settings)
    after = moving("hybrid").next_ranks(before, ONE_TYPE, FALLING | {"m.9.up": (99.0, 0.0)}, {}, settings)
    assert after.changes == [
        f"m.4.up: leaves the top set by its {words}, its adapter stays frozen",
        f"m.9.up: enters the top set by its {words}",
    ]


def test_a_module_whose_gradient_training_used_up_leaves_for_one_with_more_left_and_may_return() -> None:
    """All scores have fallen; what decides is what is left, of the trained modules as of the others."""
    before = first_ranks("hybrid", ONE_TYPE, FALLING, SETTINGS)
    left = {name: (value / 100 if value > 5 else value / 2, 0.0) for name, (value, _) in FALLING.items()}
    after = moving("hybrid").next_ranks(before, ONE_TYPE, left, {}, SETTINGS)
    assert [m.tier for m in after.modules] == ["frozen"] * 5 + ["selected"] * 5
    assert {m.rank for m in after.modules} == {4}
    again = moving("hybrid").next_ranks(after, ONE_TYPE, FALLING, {}, SETTINGS)
    assert [m.tier for m in again.modules] == ["selected"] * 5 + ["frozen"] * 5


def test_a_matrix_that_is_too_dear_stays_out() -> None:
    """Of a type of two shapes the wide one has the most left, and the narrow ones' budget does not pay for it."""
    members = [*ONE_TYPE[:9], ONE_TYPE[9].model_copy(update={"out_features": 4096})]
    before = first_ranks("hybrid", members, FALLING, SETTINGS)
    after = moving("hybrid").next_ranks(before, members, FALLING | {"m.9.up": (99.0, 0.0)}, {}, SETTINGS)
    assert [m.tier for m in after.modules] == ["selected"] * 4 + ["frozen"] + ["frozen-base"] * 5
    assert parameters(before, members) == before.budget == 5 * 4 * 48
