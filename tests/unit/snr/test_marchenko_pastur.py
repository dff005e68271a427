"""SNR by hand, and against the reference routine."""

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectraqlora.snr.gram import ErrorBounds, bfloat16_units, fill_gram, measured_error
from spectraqlora.snr.marchenko_pastur import (
    _from_gram,
    _settled,
    calibrated,
    entry_std,
    from_singular_values,
    statistics,
)


def test_snr_of_a_square_diagonal_by_hand() -> None:
    # s = 10, 3, 2, 1: q75 = 4.75, q25 = 1.75, sigma = 3 / 1.349, tau = 2 sigma = 4.4477...
    found = statistics(torch.diag(torch.tensor([10.0, 3.0, 2.0, 1.0])))
    assert found.threshold == pytest.approx(2 * 3 / 1.349)
    assert (found.signal, found.noise, found.above) == (pytest.approx(10), pytest.approx(6), 1)
    assert found.snr == pytest.approx(10 / 6 / 10)


def test_snr_of_a_wide_matrix_by_hand() -> None:
    # 2 x 8 with s = 4, 2: quartiles 3.5 and 2.5, tau = (1 / 1.349) * 1.5; nothing is below it.
    weight = torch.zeros(2, 8)
    weight[0, 0], weight[1, 1] = 4.0, 2.0
    found = statistics(weight)
    assert found.threshold == pytest.approx(1.5 / 1.349)
    assert math.isinf(found.snr)
    assert found.signal == pytest.approx(6)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 4),
        torch.ones(1, 8),
        torch.full((4, 4), 0.5),
        torch.tensor([[1.0, math.nan], [0.0, 1.0]]),
        torch.tensor([[1.0, math.inf], [0.0, 1.0]]),
        torch.ones(8),
    ],
)
def test_degenerate_matrices_have_no_snr(weight: torch.Tensor) -> None:
    assert math.isnan(statistics(weight).snr)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on matrices of this size, many times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KINDS = ["random", "low-rank plus noise", "ill-conditioned", "rank-deficient", "one outlier", "repeated rows"]


def matrix_of(kind: str, rows: int, cols: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    if kind == "low-rank plus noise":
        weight = 0.01 * weight + torch.outer(weight[:, 0], weight[0])
    elif kind == "ill-conditioned":
        weight = weight * torch.logspace(0, -8, cols, dtype=torch.float64)
    elif kind == "rank-deficient":
        rank = max(1, min(rows, cols) // 3)
        weight = weight[:, :rank] @ torch.randn(rank, cols, generator=generator, dtype=torch.float64)
    elif kind == "one outlier":
        weight[0, 0] = 1e4
    elif kind == "repeated rows":
        weight = weight[torch.arange(rows) // 2]
    return weight.to(dtype)


# 300 and 600 lie beyond the blocks and chunks in which the Gram matrix is summed.
SIDES = st.one_of(st.integers(2, 60), st.sampled_from([300]))
LONG_SIDES = st.one_of(st.integers(2, 60), st.sampled_from([300, 600]))


@settings(max_examples=100, deadline=None)
@given(
    sides=st.tuples(SIDES, LONG_SIDES),
    tall=st.booleans(),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_snr_agrees_with_svdvals_in_float64(
    sides: tuple[int, int], tall: bool, seed: int, kind: str, dtype: torch.dtype
) -> None:
    rows, cols = reversed(sides) if tall else sides
    weight = matrix_of(kind, rows, cols, seed, dtype)
    exact = from_singular_values(torch.linalg.svdvals(weight.double()), (rows, cols))
    found = statistics(weight)
    assert found.snr == pytest.approx(exact.snr, rel=1e-4)
    assert found.above == exact.above
    assert found.threshold == pytest.approx(exact.threshold, rel=1e-4, abs=1e-9 * exact.s1)


def test_a_singular_value_next_to_the_threshold_falls_on_the_side_where_svdvals_puts_it() -> None:
    # s = 9000, t, 3, 2, 1 with quartiles t and 2: tau = 2 (t - 2) / 1.349 is 3 but for a relative step.
    # The square of 9000 leaves eigenvalues of the Gram matrix no digits for such steps.
    quartile = 2 + 3 * 1.349 / 2
    for seed, step in itertools.product(range(10), (-1e-10, 1e-10)):
        base = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        left, _, right = torch.linalg.svd(base)
        values = torch.tensor([9000.0, quartile * (1 + step), 3, 2, 1], dtype=torch.float64)
        weight = left @ torch.diag(values) @ right
        exact = from_singular_values(torch.linalg.svdvals(weight), (5, 5))
        assert statistics(weight).above == exact.above


def test_ordinary_matrices_need_no_exact_routine() -> None:
    for strength in (0, 10, 100):
        weight = matrix_of("random", 300, 400, 0, torch.float64)
        weight += strength * torch.outer(weight[:, 0], weight[0]) / 20
        values = torch.linalg.eigvalsh(weight @ weight.T).flip(0).sqrt()
        found = from_singular_values(values, (300, 400))
        assert _settled(values, found, (300, 400), ErrorBounds(0.0, 0.0))


@pytest.mark.parametrize("shape", [(1100, 300), (300, 1100), (300, 300)])
def test_a_large_rank_deficient_matrix_has_the_values_of_svdvals(shape: tuple[int, int]) -> None:
    weight = matrix_of("ill-conditioned", *shape, 4, torch.float64)
    weight[:, 10:60] = weight[:, 60:110]
    exact = from_singular_values(torch.linalg.svdvals(weight), shape)
    found = statistics(weight)
    assert (found.snr, found.signal, found.noise) == (
        pytest.approx(exact.snr, rel=1e-7),
        pytest.approx(exact.signal, rel=1e-9),
        pytest.approx(exact.noise, rel=1e-7),
    )


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16 units"])
def units(request: pytest.FixtureRequest) -> Iterator[None]:
    with bfloat16_units() if request.param else nullcontext():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_large_bfloat16_matrices_agree_with_svdvals_in_float64(kind: str, units: None) -> None:
    for shape in [(1024, 1024)] if kind != "random" else [(1024, 1024), (1030, 1500), (2100, 1025)]:
        weight = matrix_of(kind, *shape, 5, torch.bfloat16)
        exact = from_singular_values(torch.linalg.svdvals(weight.double()), shape)
        found = statistics(weight)
        assert found.snr == pytest.approx(exact.snr, rel=1e-4)
        assert found.above == exact.above


def few_strong_directions(rows: int, cols: int) -> torch.Tensor:
    weight = matrix_of("random", rows, cols, 6, torch.float64)
    strong = weight[:, :4] @ matrix_of("random", 4, cols, 7, torch.float64)
    return (0.02 * (weight + 0.2 * strong)).bfloat16()


def test_a_gram_matrix_in_float32_is_enough_unless_the_spectrum_is_steep(units: None) -> None:
    weights = {
        0: few_strong_directions(1024, 1536),
        1: matrix_of("ill-conditioned", 1024, 1536, 8, torch.bfloat16),
        2: matrix_of("random", 1024, 1536, 9, torch.float32),
        3: few_strong_directions(1024, 1536) * 2.0**100,  # its products overflow
    }
    found = {index: _from_gram(weight, torch.float32) for index, weight in weights.items()}
    assert [index for index, result in found.items() if result] == [0]
    fast, precise = found[0], _from_gram(weights[0], torch.float64)
    assert fast and precise
    assert fast.snr == pytest.approx(precise.snr, rel=1e-6)
    assert fast.snr != precise.snr
    assert statistics(weights[3]).above == precise.above


def test_the_measured_error_bounds_the_error_of_a_gram_matrix_and_is_no_wild_guess(units: None) -> None:
    for weight in (few_strong_directions(300, 700), matrix_of("one outlier", 700, 300, 1, torch.bfloat16)):
        gram, exact = torch.full((2, 300, 300), math.nan, dtype=torch.float64)
        fill_gram(gram, weight, torch.float32)
        fill_gram(exact, weight, torch.float64)
        error = gram - exact
        assert torch.equal(exact, exact.tril())
        error += error.tril(-1).T
        spectral = float(torch.linalg.matrix_norm(error, 2))
        frobenius = float(torch.linalg.matrix_norm(error))
        bounds = measured_error(gram, weight)
        assert 0 < spectral <= bounds.spectral <= 8 * spectral
        assert frobenius <= bounds.frobenius <= 4 * frobenius


def test_other_products_have_their_precision_again_after_bfloat16_units() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), bfloat16_units():
        torch.set_float32_matmul_precision("medium")
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_entry_std_is_that_of_the_entries() -> None:
    weight = 3 + torch.randn(1500, 7, generator=torch.Generator().manual_seed(2))
    for same in (weight, weight.double(), weight.T):
        before = same.clone()
        assert entry_std(same) == pytest.approx(float(weight.double().std()), rel=1e-12)
        assert torch.equal(same, before)


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (40, 200), (16, 256)])
def test_calibrated_value_of_noise_is_about_one_whatever_shape_and_scale(shape: tuple[int, int]) -> None:
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    assert calibrated(statistics(weight), *shape, float(weight.std())) == pytest.approx(1.0, rel=0.35)
