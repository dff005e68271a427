"""SNR by hand, and against the reference routine."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectraqlora.snr.marchenko_pastur import calibrated, from_singular_values, statistics


def test_snr_of_a_square_diagonal_by_hand() -> None:
    # s = 10, 3, 2, 1: q75 = 4.75, q25 = 1.75, sigma = 3 / 1.349, tau = 2 sigma = 4.4477...
    found = statistics(torch.diag(torch.tensor([10.0, 3.0, 2.0, 1.0])))
    assert found.threshold == pytest.approx(2 * 3 / 1.349)
    assert (found.signal, found.noise, found.above) == (pytest.approx(10), pytest.approx(6), 1)
    assert found.snr == pytest.approx(10 / 6 / 10)


def test_snr_of_a_wide_matrix_by_hand() -> None:
    # 2 x 8 with s = 4, 2: quartiles 3.5 and 2.5, tau = (1 / 1.349) * 1.5; nothing lies below it.
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


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 60),
    cols=st.integers(2, 60),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["random", "low-rank plus noise", "ill-conditioned", "rank-deficient"]),
)
def test_snr_agrees_with_svdvals_in_float64(rows: int, cols: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    if kind == "low-rank plus noise":
        weight = 0.01 * weight + torch.outer(weight[:, 0], weight[0])
    elif kind == "ill-conditioned":
        weight = weight * torch.logspace(0, -8, cols, dtype=torch.float64)
    elif kind == "rank-deficient":
        weight = weight[:, : max(1, cols // 3)] @ torch.randn(
            max(1, cols // 3), cols, generator=generator, dtype=torch.float64
        )
    exact = from_singular_values(torch.linalg.svdvals(weight), (rows, cols))
    nearest = (torch.linalg.svdvals(weight) - exact.threshold).abs().min() / exact.s1
    if nearest < 1e-6:
        return  # a singular value on the threshold: either side is right
    assert statistics(weight).snr == pytest.approx(exact.snr, rel=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (40, 200), (16, 256)])
def test_calibrated_value_of_noise_is_about_one_whatever_shape_and_scale(shape: tuple[int, int]) -> None:
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    assert calibrated(statistics(weight), *shape, float(weight.std())) == pytest.approx(1.0, rel=0.35)
