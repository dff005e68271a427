"""The next round's rank map and the adapter carried over to it."""

from __future__ import annotations

import torch

from spectraqlora.artifacts import LinearModule, ModuleRank, RankMap
from spectraqlora.methods.ranks import allot, alors_tiers, balance_learning_rates, cost, top_percent
from spectraqlora.methods.updates import UpdateSpectrum, grow, shrink
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores


def next_rank_map(
    current: RankMap,
    modules: list[LinearModule],
    scores: Scores,
    spectra: dict[str, UpdateSpectrum],
    settings: SelectSettings,
) -> RankMap:
    """Move modules by the SNR of the updated weights and, for alors, by the spectrum of the update.

    hybrid: modules that enter the top set start at B = 0; those that leave keep their adapter, frozen.
    alors: tiers follow SNR; an update that uses all of its rank doubles it (up to twice `rank_high`), one
    that holds its energy in at most half of its rank gives the rest back.
    """
    moves: list[str] = []
    ranks: list[ModuleRank] = []
    if current.method == "hybrid":
        top = top_percent(modules, scores, settings.percent, settings.scope)
        rank = max(m.rank for m in current.modules)
        for entry in current.modules:
            if entry.module in top and entry.tier != "selected":
                moves.append(f"{entry.module}: enters the top set by SNR")
                entry = entry.model_copy(
                    update={
                        "tier": "selected",
                        "rank": rank,
                        "alpha": rank * settings.alpha_over_rank,
                    }
                )
            elif entry.module not in top and entry.tier == "selected":
                moves.append(f"{entry.module}: leaves the top set by SNR, its adapter stays frozen")
                entry = entry.model_copy(update={"tier": "frozen"})
            ranks.append(entry)
    elif current.method == "alors":
        tiers = alors_tiers(modules, scores, settings)
        sides = {m.module: min(m.in_features, m.out_features) for m in modules}
        for entry in current.modules:
            moved, reason = _alors_move(entry, tiers[entry.module], spectra, settings, sides[entry.module])
            if reason:
                moves.append(f"{entry.module}: {reason}")
            ranks.append(moved)
        ranks = _within_budget(ranks, modules, settings)
    else:
        ranks = list(current.modules)
    if moves:
        ranks = balance_learning_rates(
            [r.model_copy(update={"lr_scale": settings.high_lr if r.tier == "high" else 1.0}) for r in ranks],
            modules,
        )
    return current.model_copy(
        update={"round": current.round + 1, "modules": ranks, "changes": moves or ["nothing moved"]}
    )


def _within_budget(
    ranks: list[ModuleRank], modules: list[LinearModule], settings: SelectSettings
) -> list[ModuleRank]:
    """Ranks scaled down in proportion where the moves went over `select.budget`."""
    sides = {m.module: cost(m) for m in modules}
    budget = settings.budget * settings.rank * sum(sides.values())
    trained = {r.module: float(r.rank) for r in ranks if r.rank and r.tier != "frozen"}
    if not settings.budget or sum(rank * sides[name] for name, rank in trained.items()) <= budget:
        return ranks
    allotted = allot(trained, modules, budget, max(r.rank for r in ranks))
    return [
        r.model_copy(
            update={
                "rank": max(allotted[r.module], 1),
                "alpha": max(allotted[r.module], 1) * settings.alpha_over_rank,
            }
        )
        if r.module in trained
        else r
        for r in ranks
    ]


def _alors_move(
    entry: ModuleRank, tier: str, spectra: dict[str, UpdateSpectrum], settings: SelectSettings, side: int
) -> tuple[ModuleRank, str]:
    base = {"high": settings.rank_high, "medium": settings.rank_low}
    old = {"frozen-base": "low", "frozen": "low"}.get(entry.tier, entry.tier)
    rank, reason = entry.rank, ""
    if tier != old:
        reason = f"SNR moves it from {old} to {tier}"
        if tier == "low":
            return entry.model_copy(update={"tier": "frozen"}), reason + ", its adapter stays frozen"
        rank = base[tier]
    elif entry.module in spectra and tier != "low":
        used = spectra[entry.module].energy_rank
        ceiling = min(2 * settings.rank_high, side)
        if used >= entry.rank and entry.rank < ceiling:
            rank = min(2 * entry.rank, ceiling)
            reason = f"its update uses all {entry.rank} directions, rank {entry.rank} to {rank}"
        elif 0 < used <= entry.rank // 2:
            rank = used
            reason = f"its update lives in {used} directions, rank {entry.rank} to {rank}"
    kept = "frozen-base" if tier == "low" and entry.rank == 0 else entry.tier if tier == "low" else tier
    alpha = rank * settings.alpha_over_rank
    return entry.model_copy(update={"tier": kept, "rank": rank, "alpha": alpha}), reason


def carry_over(
    weights: dict[str, torch.Tensor], old: RankMap, new: RankMap, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Adapter weights fitted to the new ranks, and the relative error each shrunk module cost.

    Where a module's scaling changes with its rank (rsLoRA), B makes up for it: scaling·B·A stays.
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
