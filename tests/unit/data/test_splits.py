"""Train and held-out rows."""

from typing import Any

import numpy as np
import pytest
from spectraqlora.data.rows import Conversation, Origin, PromptCompletion, Text
from spectraqlora.data.splits import (
    BEYOND_HELD_OUT,
    BEYOND_ROWS,
    EQUAL,
    EQUALS_HELD_OUT,
    EQUALS_TEST,
    HELD_OUT,
    TEST,
    TRAIN,
    USED,
    choose,
    held_out_target,
    hold_out,
    row_key,
)
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings

AT = Origin("d", 1)


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def distinct(count: int) -> np.ndarray:
    return np.array([row_key(Text(str(i), AT)) for i in range(count)], np.uint64)


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [(100, {}, 20), (100, {"max_eval_rows": 5}, 5), (2, {"eval_fraction": 0.5}, 1)],
)
def test_the_held_out_share_is_bounded(rows: int, settings: dict, expected: int) -> None:
    assert held_out_target(rows, DataSettings(**settings)) == expected


@pytest.mark.parametrize(("rows", "share"), [(3, 0.01), (2, 0.9), (0, 0.5)])
def test_both_sides_have_rows_or_the_split_is_refused(rows: int, share: float) -> None:
    with pytest.raises(InputError, match=r"data\.eval_fraction"):
        held_out_target(rows, DataSettings(eval_fraction=share))


def test_by_content_the_order_of_rows_is_no_matter_and_grown_data_keeps_it() -> None:
    content, settings = distinct(50), DataSettings(split_by="content")

    def order(part: np.ndarray, seed: int = 1) -> list[int]:
        return part[choose(np.zeros(len(part), np.uint8), part, settings, seed).order].tolist()

    assert order(content) == order(content[::-1]) != order(content, seed=2)
    before = order(content[:30])
    assert [key for key in order(content) if key in before] == before


def test_a_seed_shuffles_and_at_most_so_many_rows_are_taken() -> None:
    content, splits = distinct(20), np.zeros(20, np.uint8)
    one, two = (choose(splits, content, DataSettings(), seed).order.tolist() for seed in (1, 2))
    assert sorted(one) == sorted(two) == list(range(20)) and one != two
    limited = choose(splits, content, DataSettings(max_rows=7), 1)
    assert limited.order.tolist() == one[:7]
    assert (limited.fates == BEYOND_ROWS).sum() == 13


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (PromptCompletion("Say  hi\n", "Hi", AT), PromptCompletion("say hi", " HI ", Origin("e", 9)), True),
        (PromptCompletion("a b", "c", AT), PromptCompletion("a", "b c", AT), False),
        (PromptCompletion("a", "b", AT), Text("a b", AT), False),
        (Text("Straße\n\n x", AT), Text("STRASSE x", AT), True),
        (
            Conversation([{"role": "user", "content": "A\nb"}], None, AT),
            Conversation([{"content": "a  B", "role": "user"}], None, AT),
            True,
        ),
        (
            Conversation([{"role": "user", "content": "a"}], None, AT),
            Conversation([{"role": "user", "content": "a"}], [{"type": "function"}], AT),
            False,
        ),
    ],
)
def test_rows_are_equal_but_for_white_space_and_case(one: Any, other: Any, same: bool) -> None:
    assert (row_key(one) == row_key(other)) == same


def test_equal_rows_stay_on_one_side() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        content = rng.integers(0, 30, 100).astype(np.uint64)
        held_out = hold_out(content, 20)
        assert not set(content[held_out]) & set(content[~held_out])
        assert 20 <= held_out.sum() < 100


def test_a_large_group_of_equal_rows_is_trained_on() -> None:
    held_out = hold_out(keys(*[7] * 40, *range(10, 18)), 10)
    assert held_out.tolist() == [False] * 40 + [True] * 8
    assert hold_out(keys(1, 1, 1, 2, 2), 1).tolist() == [False, False, False, True, True]


def test_rows_that_are_all_equal_are_parted_all_the_same() -> None:
    assert hold_out(keys(3, 3, 3, 3), 1).tolist() == [True, False, False, False]


def test_deduplication_keeps_the_first_of_equal_rows() -> None:
    content, splits = keys(1, 2, 1, 3, 2, 1), np.zeros(6, np.uint8)
    kept = choose(splits, content, DataSettings(), 1)
    assert (kept.fates == USED).all() and kept.equal == 3
    exact = choose(splits, content, DataSettings(deduplicate="exact"), 1)
    assert exact.fates.tolist() == [USED, USED, EQUAL, USED, EQUAL, EQUAL] and exact.equal == 0


def test_the_sources_own_splits_are_kept_and_cleared_of_what_another_holds() -> None:
    content = keys(1, 2, 3, 4, 2, 5, 6, 7, 3, 5)
    splits = np.array([TRAIN] * 4 + [HELD_OUT] * 4 + [TEST] * 2, np.uint8)
    choice = choose(splits, content, DataSettings(max_eval_rows=2), 1)
    fates = choice.fates.tolist()
    assert fates[:4] == [USED, EQUALS_HELD_OUT, EQUALS_TEST, USED]
    assert fates[5] == EQUALS_TEST and fates[8:] == [USED, USED]
    assert sorted(choice.order.tolist()) == [0, 3]
    assert len(choice.held_out) == 2 and fates.count(BEYOND_HELD_OUT) == 1
