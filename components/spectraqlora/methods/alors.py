"""alors, adaptive low-rank Spectrum: more rank and a higher learning rate where the signal is higher.

Per module type (scope "all": among all), by signal, of `count` modules:

    high    the best  round(count · high_percent / 100)                        rank_high
    medium  the next, up to  round(count · (high_percent + medium_percent) / 100)   rank_low
    low     the rest                                                            no adapter

The learning rate of the high tier is `high_lr` times that of the medium tier, both scaled so that the
parameter-weighted mean is the base rate: Σ r·(in + out)·lr_scale = Σ r·(in + out).

With `select.budget` the high and medium tiers share it in proportion to their signal instead (`ranks.allot`), by the
calibrated SNR for weights, by the square root of the energy for the task's signal, which is a square of an amplitude.

Source: Spectrum (arXiv 2406.06623) for the order; AdaLoRA (arXiv 2303.10512) for ranks that follow importance;
effective rank as in Roy and Vetterli (2007).

Later rounds: tiers follow the signal measured with the trained adapters; a module that falls to low keeps its adapter,
frozen. Where the tier stays, the update (alpha/r)·B·A decides, by the number k of its leading directions that hold
`evaluate.update_energy` of its squared norm: k = r doubles the rank (up to twice `rank_high` and the matrix's smaller side),
k ≤ r / 2 lowers it to k. With a budget, all ranks are scaled down where the moves went above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectraqlora.artifacts import LinearModule, ModuleRank, RankMap
from spectraqlora.errors import InputError
from spectraqlora.methods.ranks import (
    HIGHEST_OVER_RANK,
    allot,
    balance_learning_rates,
    best_first,
    budget_parameters,
    by_type,
    check_rank,
    cost,
    first_map,
    next_map,
)
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores

if TYPE_CHECKING:
    from spectraqlora.methods.carry_over import UpdateSpectrum
    from spectraqlora.signals.gradients import GradientSketch


class ALoRS:
    """The method alors, described above; `catalogue.Method` says what each member is for."""

    name = "alors"
    summary = (
        "rank and learning rate by signal: a high and a medium tier of every type, the low tier stays frozen"
    )
    control = False
    moves = True
    colour = "#d97706"

    def measures_gradients(self, select: SelectSettings) -> bool:
        """Where the signal is the task's, or A starts from the gradient's directions."""
        return select.needs_gradients or select.gradient_init == "on"

    def check(self, modules: list[LinearModule], select: SelectSettings) -> None:
        """Refuse ranks above the smallest matrix side, and tiers of more than 100 % (InputError)."""
        check_rank(modules, select, "rank_high", "rank_low")
        if select.high_percent + select.medium_percent > 100:
            raise InputError(
                "select.medium_percent",
                select.medium_percent,
                f"at most {100 - select.high_percent:g}, so that high and medium tiers fit in 100 %",
            )

    def first_ranks(
        self,
        modules: list[LinearModule],
        scores: Scores,
        select: SelectSettings,
        seed: int,
        sketches: Mapping[str, GradientSketch],
    ) -> RankMap:
        """Ranks by tier, or a budget shared in proportion to the signal.

        Raises:
            InputError: nothing would be trained.
        """
        tiers = _tiers(modules, scores, select)
        of_tier = {"high": select.rank_high, "medium": select.rank_low}
        rank_of = {name: of_tier[tier] for name, tier in tiers.items() if tier in of_tier}
        if select.budget:
            # Raw SNR cannot be compared across types, its tie-breaker can; energy is a square of an amplitude.
            place, power = (1, 1.0) if select.signal == "spectrum" else (0, 0.5)
            wanted = {name: max(scores[name][place], 1e-12) ** power for name in rank_of}
            budget, highest = budget_parameters(modules, select), HIGHEST_OVER_RANK * select.rank
            rank_of = {name: rank for name, rank in allot(wanted, modules, budget, highest).items() if rank}
        high = {name: select.high_lr for name, tier in tiers.items() if tier == "high"}
        return first_map(self.name, modules, tiers, rank_of, scores, select, lr_scale_of=high)

    def next_ranks(
        self,
        current: RankMap,
        modules: list[LinearModule],
        scores: Scores,
        updates: Mapping[str, UpdateSpectrum],
        select: SelectSettings,
    ) -> RankMap:
        """Tiers by the new signal; within a tier, ranks by how many directions the update uses.

        Args:
            current: this round's map.
            modules: all of the model.
            scores: measured with this round's adapters.
            updates: spectrum of (alpha/r)·B·A of the modules with an adapter.
            select: the settings.
        """
        tiers = _tiers(modules, scores, select)
        sides = {m.module: min(m.in_features, m.out_features) for m in modules}
        changes: list[str] = []
        ranks: list[ModuleRank] = []
        for entry in current.modules:
            moved, reason = _move(
                entry, tiers[entry.module], updates.get(entry.module), select, sides[entry.module]
            )
            if reason:
                changes.append(f"{entry.module}: {reason}")
            ranks.append(moved)
        ranks = _within_budget(ranks, modules, select)
        if changes:
            high = {"high": select.high_lr}
            ranks = [r.model_copy(update={"lr_scale": high.get(r.tier, 1.0)}) for r in ranks]
            ranks = balance_learning_rates(ranks, modules)
        return next_map(current, ranks, changes)


def _tiers(modules: list[LinearModule], scores: Scores, select: SelectSettings) -> dict[str, str]:
    """Tier (high, medium, low) of every module by its place within its type, or among all."""
    tiers = {m.module: "low" for m in modules}
    pools = by_type(modules).values() if select.scope == "type" else [modules]
    for members in pools:
        high = round(len(members) * select.high_percent / 100)
        medium = round(len(members) * (select.high_percent + select.medium_percent) / 100)
        for place, info in enumerate(best_first(members, scores)[:medium]):
            tiers[info.module] = "high" if place < high else "medium"
    return tiers


def _move(
    entry: ModuleRank, tier: str, update: UpdateSpectrum | None, select: SelectSettings, side: int
) -> tuple[ModuleRank, str]:
    """An entry in its new tier and with its new rank, and why; no reason where it stays as it is."""
    of_tier = {"high": select.rank_high, "medium": select.rank_low}
    old = {"frozen-base": "low", "frozen": "low"}.get(entry.tier, entry.tier)
    rank, reason = entry.rank, ""
    if tier != old:
        reason = f"its signal moves it from {old} to {tier}"
        if tier == "low":
            return entry.model_copy(update={"tier": "frozen"}), reason + ", its adapter stays frozen"
        rank = of_tier[tier]
    elif update is not None and tier != "low":
        used = update.energy_rank
        ceiling = min(2 * select.rank_high, side)
        if used >= entry.rank and entry.rank < ceiling:
            rank = min(2 * entry.rank, ceiling)
            reason = f"its update uses all {entry.rank} directions, rank {entry.rank} to {rank}"
        elif 0 < used <= entry.rank // 2:
            rank = used
            reason = f"its update uses {used} of {entry.rank} directions, rank {entry.rank} to {rank}"
    kept = "frozen-base" if tier == "low" and entry.rank == 0 else entry.tier if tier == "low" else tier
    alpha = rank * select.alpha_over_rank
    return entry.model_copy(update={"tier": kept, "rank": rank, "alpha": alpha}), reason


def _within_budget(
    ranks: list[ModuleRank], modules: list[LinearModule], select: SelectSettings
) -> list[ModuleRank]:
    """Ranks scaled down in proportion where the moves went above `select.budget`."""
    sides = {m.module: cost(m) for m in modules}
    budget = budget_parameters(modules, select)
    trained = {r.module: float(r.rank) for r in ranks if r.rank and r.tier != "frozen"}
    if not budget or sum(rank * sides[name] for name, rank in trained.items()) <= budget:
        return ranks
    allotted = allot(trained, modules, budget, max(r.rank for r in ranks))

    def lowered(entry: ModuleRank) -> ModuleRank:
        rank = max(allotted[entry.module], 1)
        return entry.model_copy(update={"rank": rank, "alpha": rank * select.alpha_over_rank})

    return [lowered(r) if r.module in trained else r for r in ranks]
