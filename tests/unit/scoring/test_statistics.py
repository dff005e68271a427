"""Noise of a comparison, by hand and against scipy."""

import numpy as np
import pytest
from scipy.stats import t, ttest_rel
from spectraqlora.scoring.statistics import difference_stderr, paired_test, two_sided_p


def test_the_stderr_of_a_difference_by_hand() -> None:
    # gaps 0, 2 over one token each: mean 1, squares 2, times 2 / (2 - 1), root 2, over 2 tokens.
    assert difference_stderr([1.0, 3.0], [1.0, 1.0], [1, 1]) == pytest.approx(1.0)
    assert difference_stderr([1.0, 3.0], [0.5, 2.5], [1, 1]) == pytest.approx(0.0)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31, 64, 199, 1000, 5001])
def test_p_values_are_students(freedom: int) -> None:
    for value in (0.0, 1e-6, 0.3, 1.0, 1.96, 2.5, 6.0, 40.0):
        expected = 2 * t.sf(value, freedom)
        assert two_sided_p(value, freedom) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert two_sided_p(-value, freedom) == two_sided_p(value, freedom)


def test_with_one_token_a_row_it_is_scipys_paired_test() -> None:
    generator = np.random.default_rng(3)
    for rows in (2, 3, 7, 50, 200):
        first = generator.normal(2, 1, rows)
        second = first + generator.normal(0.1, 0.4, rows)
        test = paired_test(list(first), list(second), [1] * rows)
        reference = ttest_rel(first, second)
        assert test.difference == pytest.approx((first - second).mean())
        assert test.difference / test.stderr == pytest.approx(reference.statistic)
        assert test.p_value == pytest.approx(reference.pvalue, abs=1e-9)


def test_long_rows_weigh_as_much_as_they_have_tokens() -> None:
    # 1 nat on the row of 9 tokens, none on that of 1 token.
    assert paired_test([10.0, 2.0], [9.0, 2.0], [9, 1]).difference == pytest.approx(0.1)


def test_one_row_and_no_difference_are_ties_and_the_same_difference_everywhere_is_none() -> None:
    assert paired_test([1.0], [9.0], [3]).tied
    assert paired_test([1.0, 2.0], [1.0, 2.0], [3, 4]).tied
    assert not paired_test([2.0, 3.0], [1.0, 2.0], [1, 1]).tied
