"""Gram matrices of weights, whose eigenvalues are the squared singular values, and the error of fast ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CHUNK = 256
"""Columns, or rows, of a matrix that are held in float64 at a time."""
_BLOCK = 256
_PROBES = 16
"""Random vectors on which an error is measured."""
_FAST_SIDE = 1024
"""Below it, measuring the error takes as long as float32 saves."""


@dataclass(frozen=True)
class ErrorBounds:
    """Upper bounds of two norms of the error E of a Gram matrix.

    No eigenvalue is off by more than the spectral norm (Weyl), nor all of them together, as the root of the sum
    of squares, by more than the Frobenius norm (Hoffman and Wielandt).
    """

    spectral: float
    frobenius: float


def fast_pays(weight: torch.Tensor) -> bool:
    """Whether to sum the Gram matrix in float32: it is large, and products of its entries are exact there.

    Not on a GPU: on an H100 the sum is a fraction of the eigenvalues' time in either type.
    """
    return not weight.is_cuda and weight.dtype == torch.bfloat16 and min(weight.shape) >= _FAST_SIDE


@contextmanager
def bfloat16_units() -> Iterator[None]:
    """Let float32 matrix products use a CPU's units for bfloat16, many times as fast, where there are any.

    They round the factors, which is exact for weights in bfloat16, and sum in float32. Vector instructions for
    bfloat16 are no such units: with them products were slower than without. The setting holds for the whole
    process: only for code that makes no other float32 products.
    """
    before = torch.get_float32_matmul_precision()
    if torch.cpu.get_capabilities().get("amx_bf16"):
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fill_gram(gram: torch.Tensor, weight: torch.Tensor, precision: torch.dtype) -> None:
    """Write the lower triangle of W·Wᵀ (W: n x m, n <= m, transposed where it is tall), summed in `precision`.

    By chunks of columns, so that only a chunk is ever held in `precision`, and by blocks of rows up to the
    diagonal, which halves the work.

    Args:
        gram: n x n, float64, of any content; zero above the diagonal afterwards.
        weight: n x m or m x n, of any floating type.
        precision: float32 or float64.
    """
    total = gram.zero_() if precision == gram.dtype else torch.zeros_like(gram, dtype=precision)
    for columns in _wide(weight).split(CHUNK * gram.itemsize // total.itemsize, dim=1):
        chunk = columns.to(precision)
        for top in range(0, len(total), _BLOCK):
            total[top : top + _BLOCK, : top + _BLOCK].addmm_(
                chunk[top : top + _BLOCK], chunk[: top + _BLOCK].T
            )
    for top in range(0, len(total), _BLOCK):
        total[top : top + _BLOCK, top : top + _BLOCK].tril_()
    if total is not gram:
        gram.copy_(total)


def measured_error(gram: torch.Tensor, weight: torch.Tensor) -> ErrorBounds:
    """Bounds of E = gram - W·Wᵀ, measured in float64; they fail for about one matrix in 100,000.

    Z are p Gaussian vectors. With u the leading eigenvector of E, |E²·Z| is at least |E|² |Zᵀu|, and |Zᵀu|² is
    chi-squared distributed with p degrees of freedom: for p = 16 it is below p / 9 with probability 4e-6.
    So |E|² <= 3 |E²·Z| / sqrt(p). The Frobenius norm f of E and the root mean square e of the norms of the columns
    of E·Z obey f² - 2 f |E| sqrt(t / p) <= e² but with probability exp(-t) (Laurent and Massart 2000, lemma 1);
    t is 12.4, for 4e-6.

    Args:
        gram: n x n, as `fill_gram` leaves it.
        weight: the same weight.

    Returns:
        The bounds; infinite where float32 overflowed.
    """
    probes = torch.randn(len(gram), _PROBES, dtype=gram.dtype, generator=torch.Generator().manual_seed(0))
    once = _apply_error(gram, weight, probes.to(gram.device))
    size = float(torch.linalg.matrix_norm(once))
    if not math.isfinite(size):
        return ErrorBounds(math.inf, math.inf)
    if size == 0:
        return ErrorBounds(0.0, 0.0)
    # Divided by its size in between: the square of a small error could underflow.
    twice = size * float(torch.linalg.matrix_norm(_apply_error(gram, weight, once / size), 2))
    spectral = math.sqrt(3 * twice / math.sqrt(_PROBES))
    slack = spectral * math.sqrt(12.4 / _PROBES)
    return ErrorBounds(spectral, slack + math.hypot(slack, size / math.sqrt(_PROBES)))


def _apply_error(gram: torch.Tensor, weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """(gram - W·Wᵀ) · vectors, n x p, in float64."""
    result = gram @ vectors + gram.T @ vectors - gram.diagonal()[:, None] * vectors
    for columns in _wide(weight).split(CHUNK, dim=1):
        chunk = columns.to(gram.dtype)
        result.addmm_(chunk, chunk.T @ vectors, alpha=-1)
    return result


def _wide(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.shape[0] <= weight.shape[1] else weight.T
