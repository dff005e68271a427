"""alors, adaptive low-rank Spectrum: more rank and a higher learning rate where the signal is higher.

Per module type (scope "all": among all), by signal, of `count` modules:

    high    the best  round(count · high_percent / 100)                        rank_high
    medium  the next, up to  round(count · (high_percent + medium_percent) / 100)   rank_low
    low     the rest                                                            no adapter

The learning rate of a trained module follows its signal. With the amplitude s of its signal (the calibrated SNR, or the
square root of the task's signal, which is a square) among the trained modules of its type (scope "all": among all),

    lr_scale  ∝  1 + (high_lr − 1) · (s − min s) / (max s − min s)

scaled so that the parameter-weighted mean is the base rate: Σ r·(in + out)·lr_scale = Σ r·(in + out).

With `select.budget` the high and medium tiers share it in proportion to their amplitude instead (`ranks.allot`).
Activations are recomputed unless `train.gradient_checkpointing` says otherwise.

Source: Spectrum (arXiv 2406.06623) for the order; AdaLoRA (arXiv 2303.10512) for ranks that follow importance within a
fixed budget; effective rank as in Roy and Vetterli (2007).

Later rounds move capacity and never add to it: no round trains more parameters than `select.budget` allows, or, where
none is set, than the first round did.

    pay    modules that fall to a lower tier (to low: the adapter stays, frozen), and those whose update (alpha/r)·B·A
           uses few of its directions: with k leading ones holding `evaluate.update_energy` of its squared norm,
           k ≤ r / 2 lowers the rank to k
    earn   first modules that rise to a higher tier, up to its rank; then those whose update uses all of its rank, k = r,
           up to twice that, at most twice `rank_high` and the matrix's smaller side

What was paid is shared among those that earn in proportion to what each asks for, in whole ranks. A module whose frozen
adapter would be trained again comes back with its rank, or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectraqlora.artifacts import LinearModule, ModuleRank, RankMap
from spectraqlora.errors import InputError
from spectraqlora.methods.ranks import (
    HIGHEST_OVER_RANK,
    allot,
    balance_learning_rates,
    best_first,
    branch_budget,
    budget_parameters,
    by_type,
    check_rank,
    cost,
    first_map,
    next_map,
)
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import SIGNAL_WORDS, Scores, amplitude

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
    recomputes = True
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
            wanted = {name: max(amplitude(scores[name], select.signal), 1e-12) for name in rank_of}
            budget, highest = budget_parameters(modules, select), HIGHEST_OVER_RANK * select.rank
            rank_of = {name: rank for name, rank in allot(wanted, modules, budget, highest).items() if rank}
        rates = learning_rates(rank_of, modules, scores, select)
        return first_map(self.name, modules, tiers, rank_of, scores, select, lr_scale_of=rates)

    def next_ranks(
        self,
        current: RankMap,
        modules: list[LinearModule],
        scores: Scores,
        updates: Mapping[str, UpdateSpectrum],
        select: SelectSettings,
    ) -> RankMap:
        """Tiers by the new signal; within a tier, ranks by how many directions the update uses; what moves is paid for.

        Args:
            current: this round's map.
            modules: all of the model.
            scores: measured with this round's adapters.
            updates: spectrum of (alpha/r)·B·A of the modules with an adapter.
            select: the settings.
        """
        tiers = _tiers(modules, scores, select)
        infos = {m.module: m for m in modules}
        moves = {
            entry.module: _move(
                entry, tiers[entry.module], updates.get(entry.module), select, infos[entry.module]
            )
            for entry in current.modules
        }
        granted = _grant(moves, modules, scores, branch_budget(current, modules))
        changes: list[str] = []
        ranks: list[ModuleRank] = []
        for entry in current.modules:
            moved, reason = _moved(entry, moves[entry.module], granted.get(entry.module, 0), select)
            if reason:
                changes.append(f"{entry.module}: {reason}")
            ranks.append(moved)
        trained = [r.module for r in ranks if r.rank and r.tier != "frozen"]
        rates = learning_rates(trained, modules, scores, select)
        ranks = [r.model_copy(update={"lr_scale": rates.get(r.module, 1.0)}) for r in ranks]
        return next_map(current, balance_learning_rates(ranks, modules), changes)


@dataclass(frozen=True)
class _Move:
    """What re-evaluation wants of a module: ranks that are trained, and the rank of an adapter that stays frozen."""

    old: str
    tier: str
    start: int
    """Trained directions that it has for certain: those it keeps."""
    wish: int
    """Trained directions that it would have where they are paid for."""
    frozen: int = 0
    """Directions of its frozen adapter, which come back together or not at all."""
    used: int = 0
    """Directions that its update uses, where that is why it moves."""


def _tiers(modules: list[LinearModule], scores: Scores, select: SelectSettings) -> dict[str, str]:
    """Tier (high, medium, low) of every module by its place within its type, or among all."""
    tiers = {m.module: "low" for m in modules}
    for members in _pools(modules, select):
        high = round(len(members) * select.high_percent / 100)
        medium = round(len(members) * (select.high_percent + select.medium_percent) / 100)
        for place, info in enumerate(best_first(members, scores)[:medium]):
            tiers[info.module] = "high" if place < high else "medium"
    return tiers


def _pools(modules: list[LinearModule], select: SelectSettings) -> list[list[LinearModule]]:
    return list(by_type(modules).values()) if select.scope == "type" else [modules]


def learning_rates(
    trained: Collection[str], modules: list[LinearModule], scores: Scores, select: SelectSettings
) -> dict[str, float]:
    """Learning rate of every trained module over that of the weakest of its pool: 1 to `select.high_lr`.

    Args:
        trained: names of the modules.
        modules: all of the model.
        scores: by `select.signal`; a module without one counts as one without signal.
        select: the settings.
    """
    rates: dict[str, float] = {}
    for members in _pools([m for m in modules if m.module in trained], select):
        signal = {m.module: amplitude(scores.get(m.module, (0.0, 0.0)), select.signal) for m in members}
        lowest, highest = min(signal.values(), default=0.0), max(signal.values(), default=0.0)
        for name, value in signal.items():
            # Where all are equal, all have the rate in the middle.
            place = (value - lowest) / (highest - lowest) if highest > lowest else 0.5
            rates[name] = 1 + (select.high_lr - 1) * place
    return rates


def _move(
    entry: ModuleRank, tier: str, update: UpdateSpectrum | None, select: SelectSettings, info: LinearModule
) -> _Move:
    """What the new signal and the update's spectrum want of a module."""
    of_tier = {"high": select.rank_high, "medium": select.rank_low, "low": 0}
    order = list(of_tier)
    old = {"frozen-base": "low", "frozen": "low"}.get(entry.tier, entry.tier)
    if old == "low":
        frozen = entry.rank if tier != "low" else 0
        return _Move(old, tier, 0, max(of_tier[tier], frozen), frozen)
    if tier != old:
        if order.index(tier) < order.index(old):
            return _Move(old, tier, entry.rank, max(entry.rank, of_tier[tier]))
        kept = min(entry.rank, of_tier[tier])
        return _Move(old, tier, kept, kept)
    used = update.energy_rank if update is not None else 0
    ceiling = min(2 * select.rank_high, info.in_features, info.out_features)
    if used >= entry.rank and entry.rank < ceiling:
        return _Move(old, tier, entry.rank, min(2 * entry.rank, ceiling), used=used)
    if 0 < used <= entry.rank // 2:
        return _Move(old, tier, used, used, used=used)
    return _Move(old, tier, entry.rank, entry.rank)


def _grant(
    moves: Mapping[str, _Move], modules: list[LinearModule], scores: Scores, budget: int
) -> dict[str, int]:
    """Trained ranks of all modules, which together cost at most `budget` parameters."""
    infos = {m.module: m for m in modules}
    ranks = {name: move.start for name, move in moves.items()}
    left = budget - sum(rank * cost(infos[name]) for name, rank in ranks.items())
    for info in best_first([m for m in modules if moves[m.module].frozen], scores):
        back = moves[info.module].frozen
        if back * cost(info) <= left:
            ranks[info.module] = back
            left -= back * cost(info)
    risen = {name for name, move in moves.items() if move.tier != move.old}
    ordered = best_first(modules, scores)
    for rising in (True, False):
        asked = {
            name: move.wish - ranks[name]
            for name, move in moves.items()
            if (name in risen) == rising and move.wish > ranks[name] and ranks[name] >= move.frozen
        }
        for name, extra in allot(asked, ordered, left, asked).items():
            ranks[name] += extra
            left -= extra * cost(infos[name])
    return ranks


def _moved(entry: ModuleRank, move: _Move, rank: int, select: SelectSettings) -> tuple[ModuleRank, str]:
    """An entry in its new tier and with its new rank, and why; no reason where it stays as it is."""
    if move.old == "low" and rank == 0:
        return entry, ""
    if move.tier == "low":
        reason = (
            f"its {SIGNAL_WORDS[select.signal]} moves it from {move.old} to low, its adapter stays frozen"
        )
        return entry.model_copy(update={"tier": "frozen"}), reason
    values = {"tier": move.tier, "rank": rank, "alpha": rank * select.alpha_over_rank}
    moved, reason = entry.model_copy(update=values), ""
    if move.tier != move.old:
        reason = f"its {SIGNAL_WORDS[select.signal]} moves it from {move.old} to {move.tier}"
    elif rank > entry.rank:
        reason = f"its update uses all {entry.rank} directions"
    elif rank < entry.rank:
        reason = f"its update uses {move.used} of {entry.rank} directions"
    if rank != entry.rank:
        reason += f", rank {entry.rank} to {rank}"
    return moved, reason
