"""The winner: lowest loss, ties within noise to fewer parameters, controls never."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora.scoring.statistics import difference_stderr
from spectraqlora.steps.compare.leaderboard import order_by_loss, winning_method

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


def test_the_stderr_of_a_difference_by_hand() -> None:
    # gaps 0, 2 over one token each: mean 1, squares 2, times 2 / (2 - 1), root 2, over 2 tokens.
    assert difference_stderr([1.0, 3.0], [1.0, 1.0], [1, 1]) == pytest.approx(1.0)
    assert difference_stderr([1.0, 3.0], [0.5, 2.5], [1, 1]) == pytest.approx(0.0)
