"""What all methods make their ranks with: shares of the modules, budgets, learning rates, the first rank map.

Every function takes the modules in the model's order. Ranks are whole numbers of LoRA directions; budgets count
trainable parameters, of which one direction costs a module in + out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from spectraqlora.artifacts import LinearModule, ModuleRank, RankMap, Shared
from spectraqlora.errors import InputError
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores


@dataclass(frozen=True)
class Group:
    """Modules that share their whole adapter, its A or its B, at one rank."""

    members: tuple[str, ...]
    shared: Shared = "pair"


HIGHEST_OVER_RANK = 4
"""A budget raises no rank above this multiple of `select.rank`."""


def by_type(modules: list[LinearModule]) -> dict[str, list[LinearModule]]:
    """Modules grouped by type, in the order of the model."""
    grouped: dict[str, list[LinearModule]] = defaultdict(list)
    for info in modules:
        grouped[info.type].append(info)
    return dict(grouped)


def cost(info: LinearModule) -> int:
    """Trainable parameters that one unit of LoRA rank costs a module: in + out."""
    return info.in_features + info.out_features


def best_first(members: list[LinearModule], scores: Scores) -> list[LinearModule]:
    """By score, the highest first; modules without a score are left out."""
    return sorted((m for m in members if m.module in scores), key=lambda m: scores[m.module], reverse=True)


def top_percent(modules: list[LinearModule], scores: Scores, percent: float, scope: str = "type") -> set[str]:
    """Names of the best modules.

    Args:
        modules: all of the model.
        scores: by module; a module without one is never among the best.
        percent: share, 0 to 100.
        scope: "type" takes per type the best floor(count · percent / 100), as Spectrum counts (arXiv 2406.06623);
            "all" takes across types the best first, while their adapters at equal rank cost at most `percent` of
            what adapters on all modules cost.
    """
    chosen: set[str] = set()
    if scope == "type":
        for members in by_type(modules).values():
            count = int(len(members) * percent / 100)
            chosen.update(m.module for m in best_first(members, scores)[:count])
        return chosen
    left = sum(map(cost, modules)) * percent / 100
    for info in best_first(modules, scores):
        if cost(info) <= left:
            chosen.add(info.module)
            left -= cost(info)
    return chosen


def check_rank(modules: list[LinearModule], select: SelectSettings, *keys: str) -> None:
    """Refuse ranks above the smallest matrix side, before anything long starts.

    Args:
        modules: all of the model.
        select: the settings.
        keys: which of its ranks the method uses, such as "rank".

    Raises:
        InputError: one of them is larger than a side of a matrix.
    """
    smallest = min(modules, key=lambda m: min(m.out_features, m.in_features))
    side = min(smallest.out_features, smallest.in_features)
    for key in keys:
        value = getattr(select, key)
        if value > side:
            raise InputError(
                f"select.{key}", value, f"at most {side}, the smallest side of {smallest.module}"
            )


def budget_parameters(modules: list[LinearModule], select: SelectSettings) -> float:
    """Trainable parameters that `select.budget` allows: its share of plain QLoRA's; 0 where none is set."""
    return select.budget * select.rank * sum(map(cost, modules))


def trained_parameters(ranks: Sequence[ModuleRank], modules: list[LinearModule]) -> int:
    """Parameters that a map's entries train: those of frozen adapters are none, what a group shares counts once."""
    infos = {m.module: m for m in modules}
    factors: dict[tuple[str | int, str], int] = {}
    for entry in ranks:
        if entry.tier != "frozen":
            for key, side in _factors(infos[entry.module], entry.group, entry.shared):
                factors[key] = entry.rank * side
    return sum(factors.values())


def _factors(
    info: LinearModule, group: int | None, shared: Shared
) -> Iterator[tuple[tuple[str | int, str], int]]:
    """(whose factor, and which) and its size for one unit of rank, of a module's A and B."""
    for name, side in (("A", info.in_features), ("B", info.out_features)):
        yield (group if group is not None and shared in (name, "pair") else info.module, name), side


def branch_budget(current: RankMap, modules: list[LinearModule]) -> int:
    """Parameters that the round after `current` may train: what the branch's first map says."""
    return current.budget or trained_parameters(current.modules, modules)


def allot(
    wanted: Mapping[str, float],
    modules: list[LinearModule],
    budget: float,
    highest: int | Mapping[str, int],
) -> dict[str, int]:
    """Whole ranks in proportion to `wanted` that together cost at most `budget` parameters.

    Args:
        wanted: relative rank per module, any positive scale.
        modules: shapes.
        budget: trainable parameters.
        highest: no rank above it, of all or of each module, nor above a matrix's smaller side.

    What the caps and the rounding leave over goes, one rank at a time, to those that are furthest behind.
    """
    members = [m for m in modules if wanted.get(m.module, 0.0) > 0]
    ceilings = dict.fromkeys(wanted, highest) if isinstance(highest, int) else highest
    caps = {m.module: min(ceilings[m.module], m.in_features, m.out_features) for m in members}

    def at(scale: float) -> dict[str, int]:
        return {m.module: min(int(wanted[m.module] * scale), caps[m.module]) for m in members}

    def spent(ranks: dict[str, int]) -> int:
        return sum(ranks[m.module] * cost(m) for m in members)

    low, high = 0.0, max((caps[m.module] / wanted[m.module] for m in members), default=0.0)
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


def equal_ranks(
    modules: list[LinearModule],
    chosen: Collection[str],
    select: SelectSettings,
    groups: Sequence[Group] = (),
    parameters: int = 0,
) -> dict[str, int]:
    """One rank for all chosen modules: `select.rank`, or the highest that the parameters allowed pay for.

    Args:
        modules: all of the model.
        chosen: names of the modules that get an adapter.
        select: the settings; its budget, where one is set, says how many parameters are allowed.
        groups: chosen modules that share factors, which then cost once.
        parameters: how many are allowed where no budget is set; 0 keeps `select.rank`.

    Raises:
        InputError: the budget does not pay for rank 1.
    """
    members = [m for m in modules if m.module in chosen]
    allowed = budget_parameters(modules, select) or parameters
    if not allowed:
        return {m.module: select.rank for m in members}
    shared = {name: (index, group.shared) for index, group in enumerate(groups) for name in group.members}
    alone: tuple[None, Shared] = (None, "pair")
    owners = {m.module: shared[m.module][0] if m.module in shared else m.module for m in members}
    factors: dict[tuple[str | int, str], int] = {}
    caps: dict[str | int, int] = {}
    for m in members:
        factors |= _factors(m, *shared.get(m.module, alone))
        owner = owners[m.module]
        caps[owner] = min(caps.get(owner, m.in_features), m.in_features, m.out_features)
    of_one_rank, highest = sum(factors.values()), HIGHEST_OVER_RANK * select.rank
    rank = min(int(allowed / of_one_rank), highest) if members else 0
    if members and rank < 1:
        raise InputError(
            "select.budget", select.budget, f"a share that pays for rank 1 on {len(caps)} adapters"
        )
    return {
        m.module: min(rank, caps[shared[m.module][0] if m.module in shared else m.module]) for m in members
    }


def balance_learning_rates(ranks: list[ModuleRank], modules: list[LinearModule]) -> list[ModuleRank]:
    """Scale lr_scale so that its mean over the trained parameters is one (the base rate)."""
    sides = {m.module: cost(m) for m in modules}
    trained = [r for r in ranks if r.rank > 0 and r.tier != "frozen"]
    total = sum(r.rank * sides[r.module] for r in trained)
    if total == 0:
        return ranks
    mean = sum(r.rank * sides[r.module] * r.lr_scale for r in trained) / total
    return [r.model_copy(update={"lr_scale": r.lr_scale / mean}) if r in trained else r for r in ranks]


def _finite(score: tuple[float, float] | None) -> float | None:
    return score[0] if score is not None and math.isfinite(score[0]) else None


def first_map(
    method: str,
    modules: list[LinearModule],
    tiers: Mapping[str, str],
    rank_of: Mapping[str, int],
    scores: Scores,
    select: SelectSettings,
    lr_scale_of: Mapping[str, float] | None = None,
    groups: Sequence[Group] = (),
) -> RankMap:
    """The first round's rank map; its base_digest is left to the step that knows the base model.

    Args:
        method: its name.
        modules: all of the model.
        tiers: what the method calls the place of every module in `rank_of`.
        rank_of: LoRA rank of every module that gets an adapter; the others stay as they are, in 4 bits.
        scores: what the method ranked the modules by; empty where it ranked none.
        select: the settings.
        lr_scale_of: learning rate over the base rate, 1 unless named; balanced over the trained parameters.
        groups: modules that share factors.

    Raises:
        InputError: nothing would be trained.
    """
    if not rank_of:
        fewest = min(len(members) for members in by_type(modules).values())
        raise InputError(
            "select.percent",
            select.percent,
            f"a share that leaves a matrix to train for {method}: a type has {fewest} matrices",
        )
    group_of = {name: (index, group.shared) for index, group in enumerate(groups) for name in group.members}
    ranks = [
        ModuleRank(
            module=info.module,
            type=info.type,
            layer=info.layer,
            tier=tiers[info.module] if info.module in rank_of else "frozen-base",
            rank=rank_of.get(info.module, 0),
            alpha=rank_of.get(info.module, 0) * select.alpha_over_rank,
            lr_scale=(lr_scale_of or {}).get(info.module, 1.0),
            group=group_of.get(info.module, (None, "pair"))[0],
            shared=group_of.get(info.module, (None, "pair"))[1],
            score=_finite(scores.get(info.module)),
        )
        for info in modules
    ]
    return RankMap(
        method=method,
        round=1,
        base_digest="",
        settings=select.model_dump(mode="json"),
        modules=balance_learning_rates(ranks, modules),
        budget=int(budget_parameters(modules, select)) or trained_parameters(ranks, modules),
    )


def next_map(current: RankMap, ranks: list[ModuleRank], changes: list[str]) -> RankMap:
    """The map of the round after `current`, with what moved in words."""
    return current.model_copy(
        update={"round": current.round + 1, "modules": ranks, "changes": changes or ["nothing moved"]}
    )
