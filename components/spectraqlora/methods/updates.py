"""What a LoRA update is made of: its spectrum, and changing its rank without changing the function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class UpdateSpectrum:
    """Of (alpha/r)·B·A: how many directions it uses."""

    energy_rank: int
    """Fewest leading singular values that hold the asked share of the squared sum."""
    effective_rank: float
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007)."""
    relative_norm: float
    """Frobenius norm of the update over that of the weight."""


def core_singular_values(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Singular values of scale·B·A (B: out x r, A: r x in) from the r x r core of two QRs."""
    core = torch.linalg.qr(b.double())[1] @ torch.linalg.qr(a.double().T)[1].T
    return scale * torch.linalg.svdvals(core)


def update_spectrum(
    a: torch.Tensor, b: torch.Tensor, scale: float, weight_norm: float, energy: float
) -> UpdateSpectrum:
    """Spectrum of an update; an update of zeros has rank 0."""
    values = core_singular_values(a, b, scale)
    squares = values**2
    total = float(squares.sum())
    if total == 0:
        return UpdateSpectrum(0, 0.0, 0.0)
    cumulative = torch.cumsum(squares, 0) / total
    share = values / values.sum()
    entropy = -float((share * share.clamp_min(1e-300).log()).sum())
    rank = int((cumulative < energy - 1e-12).sum()) + 1
    return UpdateSpectrum(
        min(rank, len(values)), math.exp(entropy), math.sqrt(total) / max(weight_norm, 1e-30)
    )


def grow(
    a: torch.Tensor, b: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad A with fresh Kaiming-uniform rows and B with zero columns: the product is unchanged."""
    extra = rank - a.shape[0]
    bound = 1 / math.sqrt(a.shape[1])
    fresh = (torch.rand(extra, a.shape[1], generator=generator) * 2 - 1) * bound
    return torch.cat([a, fresh.to(a)]), torch.cat([b, torch.zeros(b.shape[0], extra).to(b)], dim=1)


def shrink(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Best rank-`rank` approximation of B·A by SVD, and its relative Frobenius error."""
    left_q, left_r = torch.linalg.qr(b.double())
    right_q, right_r = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    root = s[:rank].sqrt()
    new_b = (left_q @ u[:, :rank]) * root
    new_a = root[:, None] * (vh[:rank] @ right_q.T)
    total = float((s**2).sum())
    error = math.sqrt(max(float((s[rank:] ** 2).sum()), 0.0) / total) if total else 0.0
    return new_a.to(a), new_b.to(b), error
