"""Singular values against the Marchenko-Pastur edge (Spectrum, arXiv 2406.06623).

sigma  = (q75(s) - q25(s)) / 1.349
tau    = sigma * (1 + sqrt(min(n, m) / max(n, m)))
signal = sum of s_i > tau,  noise = sum of s_i <= tau,  snr = signal / noise / s_1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

IQR_OF_NORMAL = 1.349
"""Interquartile range of a normal distribution in standard deviations, rounded as Spectrum rounds it."""
TOLERANCE = 1e-5
"""Relative error of signal, noise and s1 up to which eigenvalues of the Gram matrix are taken for exact."""
_EPS = torch.finfo(torch.float64).eps
CHUNK = 256
"""Columns, or rows, of a matrix that are held in float64 at a time."""
_BLOCK = 256
_REFERENCE_SIDE = 512


@dataclass(frozen=True)
class SnrStatistics:
    """Of one matrix; snr is NaN for degenerate matrices and infinite where nothing lies below tau."""

    s1: float
    threshold: float
    signal: float
    noise: float
    snr: float
    above: int


_DEGENERATE = SnrStatistics(math.nan, math.nan, math.nan, math.nan, math.nan, 0)


def statistics(weight: torch.Tensor) -> SnrStatistics:
    """SNR statistics of an (n, m) matrix of any floating type.

    Zeros, vectors (one row or column), constant matrices and any NaN or infinite entry have no
    meaningful spectrum: their snr is NaN, and NaN is never selected.
    """
    return batch_statistics([weight])[0]


def batch_statistics(weights: Sequence[torch.Tensor]) -> list[SnrStatistics]:
    """SNR statistics of matrices of equal shape on one device, in one call of the eigenvalue routine.

    Squared singular values are the eigenvalues of the smaller Gram matrix, of which LAPACK needs a quarter
    of the memory traffic of a singular value decomposition. Squaring costs digits of the small ones:
    `_settled` decides from an error bound whether that can matter, and where it can, the exact routine runs.
    """
    found = [_DEGENERATE] * len(weights)
    sound = [index for index, weight in enumerate(weights) if _has_spectrum(weight)]
    if not sound:
        return found
    rows, cols = weights[sound[0]].shape
    side = min(rows, cols)
    grams = torch.zeros(len(sound), side, side, dtype=torch.float64, device=weights[sound[0]].device)
    for gram, index in zip(grams, sound, strict=True):
        _add_gram(gram, weights[index])
    squares = torch.linalg.eigvalsh(grams)
    del grams, gram
    for values, index in zip(squares.cpu().flip(-1).clamp_min(0).sqrt(), sound, strict=True):
        result = from_singular_values(values, (rows, cols))
        if not _settled(values, result, (rows, cols)):
            result = from_singular_values(_exact_values(weights[index]).cpu(), (rows, cols))
        found[index] = result
    return found


def entry_std(weight: torch.Tensor) -> float:
    """Standard deviation of the entries of an (n, m) matrix, in float64."""
    blocks = weight.split(CHUNK)
    mean = sum(float(block.double().sum()) for block in blocks) / weight.numel()
    squares = sum(float((block.double() - mean).square_().sum()) for block in blocks)
    return math.sqrt(squares / max(1, weight.numel() - 1))


def _has_spectrum(weight: torch.Tensor) -> bool:
    if weight.ndim != 2 or min(weight.shape) < 2:
        return False
    low, high = (float(extreme) for extreme in weight.aminmax())
    return math.isfinite(low) and math.isfinite(high) and low < high


def _add_gram(gram: torch.Tensor, weight: torch.Tensor) -> None:
    """Add W·Wᵀ (W: n x m, n <= m, transposed where it is tall) to the lower triangle of `gram`, in float64.

    By chunks of columns, so that only a chunk is ever held in float64, and by blocks of rows up to the
    diagonal, which halves the work: `eigvalsh` reads nothing above it.
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    for columns in wide.split(CHUNK, dim=1):
        chunk = columns.double()
        for top in range(0, len(gram), _BLOCK):
            gram[top : top + _BLOCK, : top + _BLOCK].addmm_(
                chunk[top : top + _BLOCK], chunk[: top + _BLOCK].T
            )


def _exact_values(weight: torch.Tensor) -> torch.Tensor:
    """Singular values of an (n, m) matrix without squaring, descending, float64.

    Long matrices are first brought to their triangular factor, which has the same singular values, a block
    of rows at a time: that takes a fraction of the time and of the memory.
    """
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    length, side = tall.shape
    if length < 2 * side or weight.numel() <= CHUNK * CHUNK:
        return torch.linalg.svdvals(tall.double())
    triangle = torch.empty(0, side, dtype=torch.float64, device=weight.device)
    for rows in tall.split(side):
        triangle = torch.linalg.qr(torch.cat([triangle, rows.double()]), mode="r").R
    return torch.linalg.svdvals(triangle)


def from_singular_values(values: torch.Tensor, shape: tuple[int, int]) -> SnrStatistics:
    """SNR statistics of descending singular values of a matrix of `shape`."""
    s = values.double()
    s1 = float(s[0])
    # Below the rounding of float64 a singular value says nothing: it counts as zero, as in a rank.
    s = torch.where(s > s1 * _EPS * max(shape), s, 0.0)
    if s1 == 0:
        return _DEGENERATE
    quartiles = torch.quantile(s, torch.tensor([0.25, 0.75], dtype=torch.float64))
    sigma = float(quartiles[1] - quartiles[0]) / IQR_OF_NORMAL
    tau = sigma * _edge(shape)
    above = s > tau
    signal, noise = float(s[above].sum()), float(s[~above].sum())
    snr = signal / noise / s1 if noise > 0 else math.inf
    return SnrStatistics(s1, tau, signal, noise, snr, int(above.sum()))


def _edge(shape: tuple[int, int]) -> float:
    return 1 + math.sqrt(min(shape) / max(shape))


def _settled(values: torch.Tensor, found: SnrStatistics, shape: tuple[int, int]) -> bool:
    """Whether statistics of square roots of eigenvalues are those of the singular values.

    The eigenvalues are off by at most E = max(n, m) · eps · s1² (a generous reading of the backward error
    of Gram product and eigenvalue routine), and |sqrt(x) - sqrt(y)| <= E / max(sqrt(x), sqrt(E)) for
    |x - y| <= E. Settled means: that moves no value across the threshold, which itself moves with the
    quartiles, and none of the three sums that make the snr by more than `TOLERANCE`.
    """
    error = max(shape) * _EPS * found.s1**2
    if error == 0:
        return False
    deltas = error / values.clamp_min(math.sqrt(error))
    quartiles = torch.quantile(
        deltas, torch.tensor([0.25, 0.75], dtype=torch.float64), interpolation="higher"
    )
    threshold_error = float(quartiles.sum()) / IQR_OF_NORMAL * _edge(shape)
    if bool(((values - found.threshold).abs() <= deltas + threshold_error).any()):
        return False
    above = values > found.threshold
    return (
        float(deltas[0]) <= TOLERANCE * found.s1
        and float(deltas[above].sum()) <= TOLERANCE * found.signal
        and float(deltas[~above].sum()) <= TOLERANCE * found.noise
    )


@lru_cache(maxsize=256)
def random_reference(rows: int, cols: int) -> tuple[float, float]:
    """(snr x s1, s1 / sqrt(long side)) of a Gaussian matrix of this shape and unit entry variance.

    Measured once per shape on a fixed draw; larger shapes are scaled down at equal aspect ratio, on
    which both numbers depend alone in the limit.
    """
    short, long = sorted((rows, cols))
    scale = min(1.0, _REFERENCE_SIDE / short)
    small = (max(2, round(short * scale)), max(2, round(long * scale)))
    draw = torch.randn(small, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = statistics(draw)
    return found.signal / found.noise if found.noise else math.inf, found.s1 / math.sqrt(small[1])


def calibrated(found: SnrStatistics, rows: int, cols: int, entry_std: float) -> float:
    """The SNR over that of a random matrix of the same shape and entry variance; finite for real matrices.

    Where the random matrix has nothing below the threshold (narrow shapes), or this one has not, the
    ratio of the largest singular values, which also is one for noise, takes its place.
    """
    if math.isnan(found.snr) or entry_std == 0:
        return math.nan
    ratio, edge = random_reference(rows, cols)
    s1_ratio = found.s1 / (edge * math.sqrt(max(rows, cols)) * entry_std)
    if math.isinf(ratio) or math.isinf(found.snr) or ratio == 0:
        return s1_ratio
    return (found.signal / found.noise) / ratio / s1_ratio
