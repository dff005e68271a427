"""Train and held-out rows."""

from typing import Any

import numpy as np
import pytest
from spectraqlora.data.rows import Conversation, Origin, PromptCompletion, Text
from spectraqlora.data.splits import (
    BEYOND_HELD_OUT,
    BEYOND_ROWS,
    BEYOND_TEST,
    BEYOND_WEIGHT,
    EQUAL,
    EQUALS_HELD_OUT,
    EQUALS_TEST,
    HELD_OUT,
    NEAR,
    NEAR_HELD_OUT,
    NEAR_TEST,
    TEST,
    TRAIN,
    USED,
    choose,
    hold_out,
    part_rows,
    row_text,
    side_sizes,
    text_key,
)
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings

AT = Origin("d", 1)


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def distinct(count: int) -> np.ndarray:
    return np.array([text_key(str(i)) for i in range(count)], np.uint64)


@pytest.mark.parametrize(
    ("rows", "settings", "own", "expected"),
    [
        (100, {}, ["train"], (10, 20)),
        (100, {"max_eval_rows": 5, "max_test_rows": 3}, ["train"], (3, 5)),
        (100, {"test_fraction": 0}, ["train"], (0, 20)),
        (100, {}, ["train", "test"], (0, 20)),
        (100, {}, ["train", "held_out"], (10, 0)),
        (2, {"eval_fraction": 0.5}, ["train"], (0, 1)),
        (5, {}, ["train", "held_out", "test"], (0, 0)),
    ],
)
def test_the_shares_of_held_out_and_test_rows_are_bounded(
    rows: int, settings: dict, own: list[Any], expected: tuple[int, int]
) -> None:
    assert side_sizes(rows, DataSettings(**settings), own) == expected


@pytest.mark.parametrize(
    ("rows", "shares", "named"),
    [
        (3, {"eval_fraction": 0.01}, "eval"),
        (2, {"eval_fraction": 0.9}, "eval"),
        (0, {}, "eval"),
        (10, {"eval_fraction": 0.5, "test_fraction": 0.5}, "test"),
    ],
)
def test_all_sides_have_rows_or_the_split_is_refused(rows: int, shares: dict, named: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{named}_fraction"):
        side_sizes(rows, DataSettings(**shares), ["train"])


def test_equal_rows_stay_on_one_of_three_sides() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        content = rng.integers(0, 40, 100).astype(np.uint64)
        sides = part_rows(content, 10, 20)
        assert not (sides.test & sides.held_out).any()
        train = ~sides.test & ~sides.held_out
        parts = [set(content[side]) for side in (sides.test, sides.held_out, train)]
        assert sum(len(part) for part in parts) == len(set(content)) and all(parts)
        assert sides.test.sum() >= 10 and sides.held_out.sum() >= 20


def test_a_test_leaves_rows_that_differ_to_hold_out_and_to_train_on() -> None:
    for content in (keys(7, 7, 7, 7), keys(1, 2), keys(1, 2, *[7] * 8)):
        sides = part_rows(content, 2, 1)
        assert not sides.test.any() and sides.held_out.any() and not sides.held_out.all()


def test_rows_ordered_by_content_never_move_towards_the_test_as_data_grows() -> None:
    content, settings = distinct(400), DataSettings(split_by="content")

    def sides(part: np.ndarray) -> tuple[set[int], set[int], set[int]]:
        ordered = part[choose(np.zeros(len(part), np.uint8), part, settings, 1).order]
        parted = part_rows(ordered, 10, 20)
        train = ordered[~parted.test & ~parted.held_out]
        return set(ordered[parted.test]), set(ordered[parted.held_out]), set(train)

    (test, held_out, train), before = sides(content), sides(content[:200])
    assert len(test) == 10 and len(held_out) == 20
    assert not before[2] & (test | held_out) and not before[1] & test
    assert before[1] & train and before[0] & held_out


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
    assert (row_text(one) == row_text(other)) == same


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
    assert sorted(choice.test.tolist()) == [8, 9]
    limited = choose(splits, content, DataSettings(max_test_rows=1), 1)
    assert len(limited.test) == 1 and limited.fates.tolist()[8:].count(BEYOND_TEST) == 1


def test_of_nearly_equal_rows_one_is_kept_and_the_reason_tells_them_from_equal_ones() -> None:
    content, near = keys(1, 2, 1, 4, 5, 6, 2, 8), np.array([0, 1, 0, 0, 4, 1, 1, 7])
    splits = np.array([TRAIN] * 5 + [HELD_OUT, TEST, TEST], np.uint8)
    choice = choose(splits, content, DataSettings(deduplicate="near"), 1, near)
    fates = choice.fates.tolist()
    assert fates == [USED, EQUALS_TEST, EQUAL, NEAR, USED, NEAR_TEST, USED, USED]
    assert choice.equal == 0 and sorted(choice.order.tolist()) == [0, 4]
    held_out = np.array([TRAIN, HELD_OUT], np.uint8)
    nearly = choose(held_out, keys(1, 2), DataSettings(deduplicate="near"), 1, np.array([0, 0]))
    assert nearly.fates.tolist() == [NEAR_HELD_OUT, USED]


MIXED = DataSettings.model_validate(
    {"sources": [{"source": "a", "weight": 3}, {"source": "b", "weight": 1}], "deduplicate": "off"}
)


@pytest.mark.parametrize(
    ("rows", "expected"), [((600, 100), (300, 100)), ((30, 400), (30, 10)), ((3, 1), (3, 1))]
)
def test_weights_are_the_proportion_of_rows_and_none_is_used_twice(
    rows: tuple[int, int], expected: tuple[int, int]
) -> None:
    sources = np.repeat(np.arange(2, dtype=np.uint16), rows)
    splits = np.zeros(sum(rows), np.uint8)
    choice = choose(splits, distinct(sum(rows)), MIXED, 1, sources=sources)
    assert np.bincount(sources[choice.order]).tolist() == list(expected)
    assert (choice.fates == BEYOND_WEIGHT).sum() == sum(rows) - sum(expected)
    assert len(set(choice.order.tolist())) == sum(expected)
    # Those that are held out and tested on, the first ones, are of the same mixture.
    part = np.bincount(sources[choice.order[: sum(expected) // 3]], minlength=2)
    assert abs(part[0] - 3 * part[1]) <= 3


def test_a_source_that_is_too_small_for_its_weight_is_refused() -> None:
    sources = np.array([0, 0, 1], np.uint16)
    with pytest.raises(InputError, match=r"data\.sources\[1\]: 'weight 1': .*this one has 1"):
        choose(np.zeros(3, np.uint8), distinct(3), MIXED, 1, sources=sources)
