"""What a LoRA update is made of, and carrying it over to other ranks without changing the function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from spectraqlora.artifacts import RankMap


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
    """Spectrum of the update scale·B·A; an update of zeros has rank 0.

    Args:
        a: A (r x in).
        b: B (out x r).
        scale: factor before B·A, alpha / r.
        weight_norm: Frobenius norm of the weight matrix.
        energy: share of the squared singular values that `energy_rank` holds, 0 to 1.
    """
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
    """Pad A (r x in) with fresh Kaiming-uniform rows and B (out x r) with zero columns up to `rank`: B·A stays."""
    extra = rank - a.shape[0]
    bound = 1 / math.sqrt(a.shape[1])
    fresh = (torch.rand(extra, a.shape[1], generator=generator) * 2 - 1) * bound
    return torch.cat([a, fresh.to(a)]), torch.cat([b, torch.zeros(b.shape[0], extra).to(b)], dim=1)


def shrink(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A and B of the best rank-`rank` approximation of B·A, by SVD, and its relative Frobenius error, 0 to 1."""
    left_q, left_r = torch.linalg.qr(b.double())
    right_q, right_r = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    root = s[:rank].sqrt()
    new_b = (left_q @ u[:, :rank]) * root
    new_a = root[:, None] * (vh[:rank] @ right_q.T)
    total = float((s**2).sum())
    error = math.sqrt(max(float((s[rank:] ** 2).sum()), 0.0) / total) if total else 0.0
    return new_a.to(a), new_b.to(b), error


def carry_over(
    weights: dict[str, torch.Tensor], old: RankMap, new: RankMap, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Adapter weights fitted to the new ranks, and the relative error each shrunk module cost.

    Where a module's scaling changes with its rank (rsLoRA), B makes up for it: scaling·B·A stays. A module that
    `weights` does not hold starts fresh and is left out.

    Args:
        weights: `module.lora_A` (r x in), `module.lora_B` (out x r), and DoRA's `module.lora_magnitude_vector`.
        old: the rank map they were trained with.
        new: the next round's.
        seed: of fresh rows, with the round.
    """
    generator = torch.Generator().manual_seed(seed + new.round)
    before = {m.module: m for m in old.modules}
    carried: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for entry in new.active():
        key_a, key_b = f"{entry.module}.lora_A", f"{entry.module}.lora_B"
        if key_a not in weights:
            continue
        a, b, was = weights[key_a], weights[key_b], before[entry.module]
        if entry.rank > was.rank:
            a, b = grow(a, b, entry.rank, generator)
        elif entry.rank < was.rank:
            a, b, errors[entry.module] = shrink(a, b, entry.rank)
        carried[key_a], carried[key_b] = a, b * (old.scaling(was) / new.scaling(entry))
        magnitude = f"{entry.module}.lora_magnitude_vector"
        if magnitude in weights:
            carried[magnitude] = weights[magnitude]
    return carried, errors
