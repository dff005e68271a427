"""From scores to a method's rank map."""

from __future__ import annotations

import math
import random
from collections import defaultdict

from spectraqlora.artifacts import LinearModule, ModuleRank, RankMap
from spectraqlora.errors import InputError
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores

HIGHEST_OVER_RANK = 4
"""A budget raises no rank above this multiple of `select.rank`."""


def by_type(modules: list[LinearModule]) -> dict[str, list[LinearModule]]:
    """Modules grouped by type, in the order of the model."""
    grouped: dict[str, list[LinearModule]] = defaultdict(list)
    for info in modules:
        grouped[info.type].append(info)
    return dict(grouped)


def cost(info: LinearModule) -> int:
    """Trainable parameters that one unit of LoRA rank costs a module."""
    return info.in_features + info.out_features


def ranked(members: list[LinearModule], scores: Scores) -> list[LinearModule]:
    """Best first; modules without a score are left out."""
    return sorted((m for m in members if m.module in scores), key=lambda m: scores[m.module], reverse=True)


def top_percent(modules: list[LinearModule], scores: Scores, percent: float, scope: str = "type") -> set[str]:
    """The best modules.

    scope "type": per type the best floor(count * percent / 100), as Spectrum counts.
    scope "all": across types the best first, while their adapters at equal rank cost at most `percent` of
        what adapters on all modules cost.
    """
    chosen: set[str] = set()
    if scope == "type":
        for members in by_type(modules).values():
            count = int(len(members) * percent / 100)
            chosen.update(m.module for m in ranked(members, scores)[:count])
        return chosen
    left = sum(map(cost, modules)) * percent / 100
    for info in ranked(modules, scores):
        if cost(info) <= left:
            chosen.add(info.module)
            left -= cost(info)
    return chosen


def alors_tiers(modules: list[LinearModule], scores: Scores, settings: SelectSettings) -> dict[str, str]:
    """Tier (high, medium, low) of every module by its place within its type, or among all."""
    tiers = {m.module: "low" for m in modules}
    pools = by_type(modules).values() if settings.scope == "type" else [modules]
    for members in pools:
        best = ranked(members, scores)
        high = round(len(members) * settings.high_percent / 100)
        medium = round(len(members) * (settings.high_percent + settings.medium_percent) / 100)
        for place, info in enumerate(best[:medium]):
            tiers[info.module] = "high" if place < high else "medium"
    return tiers


def check_rank(modules: list[LinearModule], settings: SelectSettings, methods: tuple[str, ...]) -> None:
    """Refuse ranks above the smallest matrix side, before anything long starts."""
    smallest = min(modules, key=lambda m: min(m.out_features, m.in_features))
    side = min(smallest.out_features, smallest.in_features)
    keys = {"rank"} if set(methods) - {"alors"} else set()
    if "alors" in methods:
        keys |= {"rank_high", "rank_low"}
    for key in sorted(keys):
        value = getattr(settings, key)
        if value > side:
            raise InputError(
                f"select.{key}", value, f"at most {side}, the smallest side of {smallest.module}"
            )
    if "alors" in methods and settings.high_percent + settings.medium_percent > 100:
        raise InputError(
            "select.medium_percent",
            settings.medium_percent,
            f"at most {100 - settings.high_percent:g}, so that high and medium tiers fit in 100 %",
        )


def allot(
    wanted: dict[str, float], modules: list[LinearModule], budget: float, highest: int
) -> dict[str, int]:
    """Whole ranks in proportion to `wanted` that together cost at most `budget` parameters.

    Args:
        wanted: relative rank per module, any positive scale.
        modules: shapes.
        budget: trainable parameters.
        highest: no rank above it, nor above a matrix's smaller side.

    What the caps and the rounding leave over goes, one rank at a time, to those that are furthest behind.
    """
    members = [m for m in modules if wanted.get(m.module, 0.0) > 0]
    caps = {m.module: min(highest, m.in_features, m.out_features) for m in members}

    def at(scale: float) -> dict[str, int]:
        return {m.module: min(int(wanted[m.module] * scale), caps[m.module]) for m in members}

    def spent(ranks: dict[str, int]) -> int:
        return sum(ranks[m.module] * cost(m) for m in members)

    low, high = 0.0, highest / min(wanted[m.module] for m in members) if members else 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(middle)) <= budget else (low, middle)
    ranks = at(low)
    left = budget - spent(ranks)
    while True:
        open_ = [m for m in members if ranks[m.module] < caps[m.module] and cost(m) <= left]
        if not open_:
            return ranks
        behind = max(open_, key=lambda m: wanted[m.module] * low - ranks[m.module])
        ranks[behind.module] += 1
        left -= cost(behind)


def balance_learning_rates(ranks: list[ModuleRank], modules: list[LinearModule]) -> list[ModuleRank]:
    """Scale lr_scale so that its mean over the trained parameters is one (the base rate)."""
    sides = {m.module: cost(m) for m in modules}
    trained = [r for r in ranks if r.rank > 0 and r.tier != "frozen"]
    total = sum(r.rank * sides[r.module] for r in trained)
    if total == 0:
        return ranks
    mean = sum(r.rank * sides[r.module] * r.lr_scale for r in trained) / total
    return [r.model_copy(update={"lr_scale": r.lr_scale / mean}) if r in trained else r for r in ranks]


def _tiers(
    method: str, modules: list[LinearModule], scores: Scores, settings: SelectSettings, seed: int
) -> dict[str, str]:
    if method == "qlora":
        return {m.module: "all" for m in modules}
    if method == "alors":
        return alors_tiers(modules, scores, settings)
    if method == "random":
        generator = random.Random(seed)
        scores = {m.module: (generator.random(), 0.0) for m in modules}
    chosen = top_percent(modules, scores, settings.percent, settings.scope)
    return {m.module: "selected" for m in modules if m.module in chosen}


def _ranks(
    method: str,
    modules: list[LinearModule],
    tiers: dict[str, str],
    scores: Scores,
    settings: SelectSettings,
    groups: list[list[str]] | None,
) -> dict[str, int]:
    """LoRA rank of every module that gets one: by tier, or from the budget (alors in proportion to scores)."""
    of_tier = {
        "all": settings.rank,
        "selected": settings.rank,
        "high": settings.rank_high,
        "medium": settings.rank_low,
    }
    by_tier = {name: of_tier[tier] for name, tier in tiers.items() if tier in of_tier}
    if not settings.budget:
        return by_tier
    budget = settings.budget * settings.rank * sum(map(cost, modules))
    highest = HIGHEST_OVER_RANK * settings.rank
    if method == "alors":
        # Raw SNR cannot be compared across types, its tie-breaker can; energy is a square of an amplitude.
        place, power = (1, 1.0) if settings.signal == "spectrum" else (0, 0.5)
        wanted = {name: max(scores[name][place], 1e-12) ** power for name in by_tier}
        return {name: rank for name, rank in allot(wanted, modules, budget, highest).items() if rank}
    # One rank for all; a group's shared pair costs once.
    shared = {name: index for index, group in enumerate(groups or []) for name in group}
    members = {shared.get(m.module, m.module): m for m in modules if m.module in by_tier}
    rank = min(int(budget / sum(map(cost, members.values()))), highest) if members else 0
    if members and rank < 1:
        raise InputError(
            "select.budget", settings.budget, f"a share that pays for rank 1 on {len(members)} adapters"
        )
    return {m.module: min(rank, m.in_features, m.out_features) for m in modules if m.module in by_tier}


def _finite(score: tuple[float, float] | None) -> float | None:
    return score[0] if score is not None and math.isfinite(score[0]) else None


def rank_map(
    method: str,
    modules: list[LinearModule],
    scores: Scores,
    settings: SelectSettings,
    base_digest: str,
    seed: int,
    groups: list[list[str]] | None = None,
) -> RankMap:
    """The first round's rank map of a method.

    Raises:
        InputError: nothing would be trained.
    """
    tiers = _tiers(method, modules, scores, settings, seed)
    rank_of = _ranks(method, modules, tiers, scores, settings, groups)
    if not rank_of:
        fewest = min(len(members) for members in by_type(modules).values())
        raise InputError(
            "select.percent",
            settings.percent,
            f"a share that leaves a matrix to train for {method}: a type has {fewest} matrices",
        )
    group_of = {name: index for index, group in enumerate(groups or []) for name in group}
    ranks = [
        ModuleRank(
            module=info.module,
            type=info.type,
            layer=info.layer,
            tier=tiers[info.module] if info.module in rank_of else "frozen-base",
            rank=rank_of.get(info.module, 0),
            alpha=rank_of.get(info.module, 0) * settings.alpha_over_rank,
            lr_scale=settings.high_lr if tiers.get(info.module) == "high" else 1.0,
            group=group_of.get(info.module),
            score=_finite(scores.get(info.module)),
        )
        for info in modules
    ]
    return RankMap(
        method=method,
        round=1,
        base_digest=base_digest,
        settings=settings.model_dump(mode="json"),
        modules=balance_learning_rates(ranks, modules),
    )
