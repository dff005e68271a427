"""From SNR table, model and data to a method's rank map."""

from __future__ import annotations

import random
from collections import defaultdict

from spectraqlora.artifacts import LinearModule, ModuleRank, RankMap
from spectraqlora.errors import InputError
from spectraqlora.select_layers.gradients import GradientSketch
from spectraqlora.settings import SelectSettings

Scores = dict[str, tuple[float, float]]
"""Per module (score, tie-breaker); modules without one are never selected."""


def by_type(modules: list[LinearModule]) -> dict[str, list[LinearModule]]:
    """Modules grouped by type, in the order of the model."""
    grouped: dict[str, list[LinearModule]] = defaultdict(list)
    for info in modules:
        grouped[info.type].append(info)
    return dict(grouped)


def ranked(members: list[LinearModule], scores: Scores) -> list[LinearModule]:
    """Best first; modules without a score are left out."""
    return sorted((m for m in members if m.module in scores), key=lambda m: scores[m.module], reverse=True)


def task_scores(modules: list[LinearModule], sketches: dict[str, GradientSketch], rank: int) -> Scores:
    """Low-rank gradient energy per parameter that the adapter would cost; ties by gradient SNR."""
    return {
        m.module: (
            sketches[m.module].energy(rank) / (rank * (m.in_features + m.out_features)),
            sketches[m.module].gradient_snr,
        )
        for m in modules
        if m.module in sketches
    }


def top_percent(modules: list[LinearModule], scores: Scores, percent: float) -> set[str]:
    """Per type the best floor(count * percent / 100) modules, as Spectrum counts."""
    chosen: set[str] = set()
    for members in by_type(modules).values():
        count = int(len(members) * percent / 100)
        chosen.update(m.module for m in ranked(members, scores)[:count])
    return chosen


def alors_tiers(modules: list[LinearModule], scores: Scores, settings: SelectSettings) -> dict[str, str]:
    """Tier (high, medium, low) of every module by its place within its type."""
    tiers = {m.module: "low" for m in modules}
    for members in by_type(modules).values():
        order = ranked(members, scores)
        high = round(len(members) * settings.high_percent / 100)
        medium = round(len(members) * (settings.high_percent + settings.medium_percent) / 100)
        for place, info in enumerate(order[:medium]):
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


def balance_learning_rates(ranks: list[ModuleRank], modules: list[LinearModule]) -> list[ModuleRank]:
    """Scale lr_scale so that its mean over the trained parameters is one (the base rate)."""
    sides = {m.module: m.in_features + m.out_features for m in modules}
    trained = [r for r in ranks if r.rank > 0 and r.tier != "frozen"]
    cost = sum(r.rank * sides[r.module] for r in trained)
    if cost == 0:
        return ranks
    mean = sum(r.rank * sides[r.module] * r.lr_scale for r in trained) / cost
    return [r.model_copy(update={"lr_scale": r.lr_scale / mean}) if r in trained else r for r in ranks]


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
    names = {m.module for m in modules}
    tiers = {name: "frozen-base" for name in names}
    if method == "qlora":
        tiers = dict.fromkeys(names, "all")
    elif method in ("hybrid", "sgm"):
        tiers |= dict.fromkeys(top_percent(modules, scores, settings.percent), "selected")
    elif method == "alors":
        tiers = alors_tiers(modules, scores, settings)
    elif method == "random":
        generator = random.Random(seed)
        chance = {m.module: (generator.random(), 0.0) for m in modules}
        tiers |= dict.fromkeys(top_percent(modules, chance, settings.percent), "selected")
    rank_of = {
        "all": settings.rank,
        "selected": settings.rank,
        "high": settings.rank_high,
        "medium": settings.rank_low,
    }
    group_of = {name: index for index, group in enumerate(groups or []) for name in group}
    ranks = []
    for info in modules:
        rank = rank_of.get(tiers[info.module], 0)
        ranks.append(
            ModuleRank(
                module=info.module,
                type=info.type,
                layer=info.layer,
                tier=tiers[info.module] if rank else "frozen-base",
                rank=rank,
                alpha=rank * settings.alpha_over_rank,
                lr_scale=settings.high_lr if tiers[info.module] == "high" else 1.0,
                group=group_of.get(info.module),
            )
        )
    if not any(r.rank for r in ranks):
        fewest = min(len(members) for members in by_type(modules).values())
        raise InputError(
            "select.percent",
            settings.percent,
            f"a share that leaves a matrix to train for {method}: a type has {fewest} matrices",
        )
    return RankMap(
        method=method,
        round=1,
        base_digest=base_digest,
        settings=settings.model_dump(mode="json"),
        modules=balance_learning_rates(ranks, modules),
    )
