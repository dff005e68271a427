"""The winner: lowest loss, ties by a paired test to fewer parameters, controls never."""

import numpy as np
import pytest
from scipy.stats import ttest_rel
from spectraqlora.errors import InputError
from spectraqlora.steps.compare.leaderboard import against_best, order_by_loss, winning_method

from tests.unit.results import evaluation

STEADY = [2.0, 3.0, 1.0, 2.5, 1.5]


def test_order_and_winner_follow_the_loss() -> None:
    good, bad = evaluation("hybrid", STEADY, 10), evaluation("qlora", [x + 1 for x in STEADY], 20)
    assert [e.method for e in order_by_loss([bad, good])] == ["hybrid", "qlora"]
    assert winning_method([bad, good]) == "hybrid"


def test_a_gap_on_every_row_beats_fewer_parameters_and_noise_does_not() -> None:
    best = evaluation("qlora", STEADY, 20)
    everywhere = evaluation("hybrid", [x + 0.05 for x in STEADY], 10)
    assert winning_method([best, everywhere]) == "qlora"
    noisy = evaluation("hybrid", [2.6, 2.5, 1.6, 2.0, 1.55], 10)
    assert noisy.eval_loss > best.eval_loss
    assert winning_method([best, noisy]) == "hybrid"


def test_a_control_by_chance_is_never_promoted() -> None:
    chance, real = evaluation("random", STEADY, 10), evaluation("hybrid", [x + 1 for x in STEADY], 10)
    assert order_by_loss([real, chance])[0].method == "random"
    assert winning_method([real, chance]) == "hybrid"


@pytest.mark.parametrize("digest", ["base_digest", "data_digest"])
def test_branches_of_different_inputs_are_not_compared(digest: str) -> None:
    with pytest.raises(InputError, match=f"hybrid {digest}"):
        order_by_loss([evaluation("qlora", STEADY, 1), evaluation("hybrid", STEADY, 1, **{digest: "x" * 64})])


def test_the_winner_is_that_of_scipys_paired_test_on_random_rows() -> None:
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        rows = int(generator.integers(2, 40))
        best = generator.normal(3, 1, rows)
        other = best + generator.normal(0.1, 0.3, rows)
        first, second = (
            evaluation(name, list(losses), parameters)
            for name, losses, parameters in (("qlora", best, 20), ("hybrid", other, 10))
        )
        expected = (
            "hybrid" if other.mean() < best.mean() or ttest_rel(other, best).pvalue >= 0.05 else "qlora"
        )
        assert winning_method([first, second]) == expected
        outcomes.add(expected)
    assert outcomes == {"qlora", "hybrid"}


def test_of_those_that_are_tied_the_fewest_parameters_win_and_then_the_lower_loss() -> None:
    branches = [
        evaluation("qlora", STEADY, 30),
        evaluation("hybrid", [2.5, 2.6, 1.5, 2.1, 1.6], 20),
        evaluation("sgm", [2.5, 2.6, 1.5, 2.1, 1.5], 20),
        evaluation("alors", [x + 1 for x in STEADY], 10),
    ]
    tests = against_best(branches)
    assert [name for name, test in tests.items() if test.tied] == ["qlora", "sgm", "hybrid"]
    assert winning_method(branches) == "sgm"
    assert tests["qlora"].difference == 0


def test_one_row_decides_nothing() -> None:
    assert winning_method([evaluation("qlora", [1.0], 20), evaluation("hybrid", [2.0], 10)]) == "hybrid"


def test_a_control_is_compared_with_the_best_that_can_win() -> None:
    chance, real = evaluation("random", STEADY, 10), evaluation("hybrid", [x + 1 for x in STEADY], 10)
    tests = against_best([chance, real])
    assert tests["random"].difference == pytest.approx(-1) and not tests["random"].tied
    assert winning_method([chance]) == "random"
