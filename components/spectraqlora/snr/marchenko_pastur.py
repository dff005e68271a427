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

from spectraqlora.snr.gram import CHUNK, ErrorBounds, fast_pays, fill_gram, measured_error

IQR_OF_NORMAL = 1.349
"""Interquartile range of a normal distribution in standard deviations, rounded as Spectrum rounds it."""
TOLERANCE = 8e-5
"""Bound of an snr's relative error up to which it is taken from the eigenvalues of the Gram matrix."""
_EPS = torch.finfo(torch.float64).eps
_STD_BLOCK, _STD_BLOCK_OF_GPU = 2**17, 2**24
"""Entries that fit in a core's cache in float64, and those that keep a GPU busy."""
_REFERENCE_SIDE = 512


@dataclass(frozen=True)
class SnrStatistics:
    """Of one matrix; snr is NaN for degenerate matrices and infinite where nothing is below tau."""

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

    Squared singular values are the eigenvalues of the smaller Gram matrix, of which LAPACK needs a quarter
    of the memory traffic of a singular value decomposition. Squaring costs digits of the small ones, and
    summing in float32, on a CPU a few times as fast, some of all. `_settled` decides from an error bound whether
    that can matter: where it can, the Gram matrix is summed in float64, and if need be the exact routine runs.
    """
    if not _has_spectrum(weight):
        return _DEGENERATE
    for precision in (torch.float32, torch.float64):
        if result := _from_gram(weight, precision):
            return result
    return from_singular_values(_exact_values(weight).cpu(), shape_of(weight))


def _from_gram(weight: torch.Tensor, precision: torch.dtype) -> SnrStatistics | None:
    """Statistics by a Gram matrix summed in `precision`; None where that does not pay or is not exact enough."""
    fast = precision == torch.float32
    if fast and not fast_pays(weight):
        return None
    side, shape = min(weight.shape), shape_of(weight)
    gram = torch.empty(side, side, dtype=torch.float64, device=weight.device)
    fill_gram(gram, weight, precision)
    error = measured_error(gram, weight) if fast else ErrorBounds(0.0, 0.0)
    # Where the error reaches a tenth of the mean distance of eigenvalues, one of them is too likely to be within
    # reach of the threshold.
    if not error.spectral < 0.1 * float(gram.trace()) / side**2 < math.inf:
        return None
    values = torch.linalg.eigvalsh(gram).cpu().flip(-1).clamp_min(0).sqrt()
    result = from_singular_values(values, shape)
    return result if _settled(values, result, shape, error) else None


def entry_std(weight: torch.Tensor) -> float:
    """Standard deviation of the entries of an (n, m) matrix, in float64, some rows at a time."""
    count, mean, squares = 0, 0.0, 0.0
    block = _STD_BLOCK_OF_GPU if weight.is_cuda else _STD_BLOCK
    for rows in weight.split(max(1, block // weight.shape[1])):
        entries = rows.double().reshape(-1)
        size, own_mean = len(entries), float(entries.mean())
        entries = entries - own_mean
        step = own_mean - mean
        squares += float(entries @ entries) + step**2 * count * size / (count + size)
        mean += step * size / (count + size)
        count += size
    return math.sqrt(squares / max(1, count - 1))


def _has_spectrum(weight: torch.Tensor) -> bool:
    if weight.ndim != 2 or min(weight.shape) < 2:
        return False
    low, high = (float(extreme) for extreme in weight.aminmax())
    return math.isfinite(low) and math.isfinite(high) and low < high


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


def shape_of(weight: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of a matrix."""
    rows, cols = weight.shape
    return rows, cols


def _edge(shape: tuple[int, int]) -> float:
    return 1 + math.sqrt(min(shape) / max(shape))


def _settled(
    values: torch.Tensor, result: SnrStatistics, shape: tuple[int, int], product: ErrorBounds
) -> bool:
    """Whether statistics of square roots of eigenvalues are those of the singular values.

    The eigenvalues are off by at most E = max(n, m) · eps · s1² (a generous reading of the backward error
    of Gram product and eigenvalue routine in float64), to which comes what a `product` in float32 is off, and
    |sqrt(x) - sqrt(y)| <= E / max(sqrt(x), sqrt(E)) for |x - y| <= E. Settled means: that moves no value
    across the threshold, which itself moves with the quartiles, and signal, noise and s1 together by no
    more than `TOLERANCE`, relative to each.
    """
    rounding = max(shape) * _EPS * result.s1**2
    error = ErrorBounds(rounding + product.spectral, math.sqrt(len(values)) * rounding + product.frobenius)
    if error.spectral == 0:
        return False
    inverse = 1 / values.clamp_min(math.sqrt(error.spectral))
    deltas = error.spectral * inverse
    quartiles = torch.quantile(
        deltas, torch.tensor([0.25, 0.75], dtype=torch.float64), interpolation="higher"
    )
    threshold_error = float(quartiles.sum()) / IQR_OF_NORMAL * _edge(shape)
    if bool(((values - result.threshold).abs() <= deltas + threshold_error).any()):
        return False
    parts = [
        (inverse[:1], result.s1),
        (inverse[: result.above], result.signal),
        (inverse[result.above :], result.noise),
    ]
    errors = ((_error_of_sum(of, error), total) for of, total in parts if len(of))
    return sum(off / total if total else math.inf for off, total in errors) <= TOLERANCE


def _error_of_sum(inverse: torch.Tensor, error: ErrorBounds) -> float:
    """How far a sum of singular values can be off whose reciprocals are `inverse`, ascending.

    For the smallest ones each by the spectral bound, for the others all together by the Frobenius bound
    (Cauchy and Schwarz); wherever one draws the line between the two, the sum of both is a bound. The
    Frobenius bound says nothing of those below the root of the spectral one, whose reciprocal is capped.
    """
    smallest_first = torch.cat([inverse.new_zeros(1), inverse.flip(0)])
    others = (inverse**2).sum() - (smallest_first**2).cumsum(0)
    bounds = error.spectral * smallest_first.cumsum(0) + error.frobenius * others.clamp_min(0).sqrt()
    capped = int((inverse * math.sqrt(error.spectral) > 1 - 1e-9).sum())
    return float(bounds[capped:].min())


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
    result = statistics(draw)
    return result.signal / result.noise if result.noise else math.inf, result.s1 / math.sqrt(small[1])


def calibrated(result: SnrStatistics, rows: int, cols: int, entry_std: float) -> float:
    """The SNR over that of a random matrix of the same shape and entry variance; finite for real matrices.

    Where the random matrix has nothing below the threshold (narrow shapes), or this one has not, the
    ratio of the largest singular values, which also is one for noise, takes its place.
    """
    if math.isnan(result.snr) or entry_std == 0:
        return math.nan
    ratio, edge = random_reference(rows, cols)
    s1_ratio = result.s1 / (edge * math.sqrt(max(rows, cols)) * entry_std)
    if math.isinf(ratio) or math.isinf(result.snr) or ratio == 0:
        return s1_ratio
    return (result.signal / result.noise) / ratio / s1_ratio
