"""Singular values against the Marchenko-Pastur edge (Spectrum, arXiv 2406.06623).

sigma  = (q75(s) - q25(s)) / 1.349
tau    = sigma * (1 + sqrt(min(n, m) / max(n, m)))
signal = sum of s_i > tau,  noise = sum of s_i <= tau,  snr = signal / noise / s_1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

IQR_OF_NORMAL = 1.349
"""Interquartile range of a normal distribution in standard deviations, rounded as Spectrum rounds it."""
EXACT_BELOW = 1e-6
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


def singular_values(weight: torch.Tensor) -> torch.Tensor:
    """Singular values of an (n, m) matrix, descending, float64, from the smaller Gram matrix.

    Squaring leaves a value of relative size v an error of about 1e-16 / v^2; where the smallest is below
    `EXACT_BELOW` of the largest, the exact routine is used instead.
    """
    matrix = weight.double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    values = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp_min(0).sqrt()
    if float(values[-1]) < EXACT_BELOW * float(values[0]):
        return torch.linalg.svdvals(matrix)
    return values


_DEGENERATE = SnrStatistics(math.nan, math.nan, math.nan, math.nan, math.nan, 0)


def statistics(weight: torch.Tensor) -> SnrStatistics:
    """SNR statistics of an (n, m) matrix.

    Zeros, vectors (one row or column), constant matrices and any NaN or infinite entry have no
    meaningful spectrum: their snr is NaN, and NaN is never selected.
    """
    if weight.ndim != 2 or min(weight.shape) < 2 or not bool(torch.isfinite(weight).all()):
        return _DEGENERATE
    if bool((weight == weight.flatten()[0]).all()):
        return _DEGENERATE
    return from_singular_values(singular_values(weight), (int(weight.shape[0]), int(weight.shape[1])))


def from_singular_values(values: torch.Tensor, shape: tuple[int, int]) -> SnrStatistics:
    """SNR statistics of descending singular values of a matrix of `shape`."""
    s = values.double()
    s1 = float(s[0])
    # Below the rounding of float64 a singular value says nothing: it counts as zero, as in a rank.
    s = torch.where(s > s1 * torch.finfo(torch.float64).eps * max(shape), s, 0.0)
    if s1 == 0:
        return _DEGENERATE
    quartiles = torch.quantile(s, torch.tensor([0.25, 0.75], dtype=torch.float64))
    sigma = float(quartiles[1] - quartiles[0]) / IQR_OF_NORMAL
    tau = sigma * (1 + math.sqrt(min(shape) / max(shape)))
    above = s > tau
    signal, noise = float(s[above].sum()), float(s[~above].sum())
    snr = signal / noise / s1 if noise > 0 else math.inf
    return SnrStatistics(s1, tau, signal, noise, snr, int(above.sum()))


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
    found = from_singular_values(singular_values(draw), small)
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
