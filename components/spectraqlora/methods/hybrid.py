"""hybrid, SpectraQLoRA: adapters only where the signal is.

All modules start without an adapter. Per module type the best

    k = floor(count · percent / 100)          (scope "all": the best across types, within percent of the cost)

by signal get LoRA of rank r = `select.rank`, or of the rank that `select.budget` pays for; the others stay frozen in
4 bits. The signal is that of `select.signal`: the weights' (Spectrum), the task's, or both.

Source: Spectrum's selection (arXiv 2406.06623), which trains the best share of every type in full, applied to QLoRA's
adapters (arXiv 2305.14314).

Later rounds: the signal is measured again with the trained adapters in place, of all modules at the same point: for the
task's signal that is what is left to gain, of the modules that were trained and of those that were not. A module that
enters the top set gets a fresh adapter of the same rank whose B is 0, so that the function does not jump; one that leaves
keeps its adapter, frozen. Modules enter best first, while the round trains no more parameters than the first one may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.methods.ranks import (
    best_first,
    branch_budget,
    check_rank,
    cost,
    equal_ranks,
    first_map,
    next_map,
    top_percent,
)
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import SIGNAL_WORDS, Scores

if TYPE_CHECKING:
    from spectraqlora.methods.carry_over import UpdateSpectrum
    from spectraqlora.signals.gradients import GradientSketch


class Hybrid:
    """The method hybrid, described above; `catalogue.Method` says what each member is for."""

    name = "hybrid"
    summary = (
        "LoRA of one rank on the best share of every module type by signal; the rest stays frozen in 4 bits"
    )
    control = False
    moves = True
    recomputes = False
    colour = "#2f7ed8"

    def measures_gradients(self, select: SelectSettings) -> bool:
        """Where the signal is the task's, or A starts from the gradient's directions."""
        return select.needs_gradients or select.gradient_init == "on"

    def check(self, modules: list[LinearModule], select: SelectSettings) -> None:
        """Refuse a rank above the smallest matrix side (InputError)."""
        check_rank(modules, select, "rank")

    def first_ranks(
        self,
        modules: list[LinearModule],
        scores: Scores,
        select: SelectSettings,
        seed: int,
        sketches: Mapping[str, GradientSketch],
    ) -> RankMap:
        """One rank for the best share of the modules.

        Raises:
            InputError: the share selects nothing, or the budget does not pay for rank 1.
        """
        chosen = top_percent(modules, scores, select.percent, select.scope)
        tiers = dict.fromkeys(chosen, "selected")
        return first_map(self.name, modules, tiers, equal_ranks(modules, chosen, select), scores, select)

    def next_ranks(
        self,
        current: RankMap,
        modules: list[LinearModule],
        scores: Scores,
        updates: Mapping[str, UpdateSpectrum],
        select: SelectSettings,
    ) -> RankMap:
        """Modules that enter the top set get an adapter; those that leave keep theirs, frozen.

        Args:
            current: this round's map.
            modules: all of the model.
            scores: measured with this round's adapters.
            updates: what the adapters learned; not read.
            select: the settings.
        """
        top = top_percent(modules, scores, select.percent, select.scope)
        infos = {m.module: m for m in modules}
        before = {m.module: m for m in current.trained()}
        rank = max(m.rank for m in current.modules)
        left = branch_budget(current, modules)
        left -= sum(entry.rank * cost(infos[name]) for name, entry in before.items() if name in top)
        entering: dict[str, int] = {}
        candidates = [m for m in modules if m.module in top and m.module not in before]
        for info in best_first(candidates, scores):
            fitting = min(rank, info.in_features, info.out_features)
            if fitting * cost(info) <= left:
                entering[info.module] = fitting
                left -= fitting * cost(info)
        signal = SIGNAL_WORDS[select.signal]
        changes: list[str] = []
        ranks = []
        for entry in current.modules:
            if entry.module in entering:
                changes.append(f"{entry.module}: enters the top set by its {signal}")
                fitting = entering[entry.module]
                values = {"tier": "selected", "rank": fitting, "alpha": fitting * select.alpha_over_rank}
                entry = entry.model_copy(update=values)
            elif entry.module in before and entry.module not in top:
                changes.append(
                    f"{entry.module}: leaves the top set by its {signal}, its adapter stays frozen"
                )
                entry = entry.model_copy(update={"tier": "frozen"})
            ranks.append(entry)
        return next_map(current, ranks, changes)
