"""hybrid: the top share of every type, and what enters and leaves it."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import moving
from spectraqlora.settings import SelectSettings
from spectraqlora.steps.re_evaluate.following_round import floor_scores

from tests.modules import first_ranks, modules

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
        "m.4.up: leaves the top set by its signal, its adapter stays frozen",
        "m.9.up: enters the top set by its signal",
    ]
    assert after.round == 2
    same = moving("hybrid").next_ranks(before, ONE_TYPE, FALLING, {}, SETTINGS)
    assert same.changes == ["nothing moved"] and same.modules == before.modules


def test_modules_keep_the_task_score_they_were_chosen_for() -> None:
    before = first_ranks("hybrid", ONE_TYPE, FALLING, SETTINGS)
    used_up = {name: (score / 100, 0.0) for name, (score, _) in FALLING.items()}
    kept = floor_scores(used_up, before)
    assert moving("hybrid").next_ranks(before, ONE_TYPE, kept, {}, SETTINGS).changes == ["nothing moved"]
