"""random, a control: as many modules as hybrid takes, drawn by chance.

Every module gets a uniform random number as its score, drawn in the model's order from the seed; the rest is hybrid's
selection: per type the best floor(count · percent / 100) get LoRA of rank r. A selection by signal that does not beat
this one says nothing for its signal.

Source: the control of selection studies; Spectrum (arXiv 2406.06623) for the count per type.

Later rounds: nothing moves, so there are none.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.methods.ranks import check_rank, equal_ranks, first_map, top_percent
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores

if TYPE_CHECKING:
    from spectraqlora.signals.gradients import GradientSketch


class RandomControl:
    """The method random, described above; `catalogue.Method` says what each member is for."""

    name = "random"
    summary = "a control: hybrid's share of the modules, drawn by chance; compared, never the winner"
    control = True
    moves = False
    recomputes = False
    colour = "#a855a0"

    def measures_gradients(self, select: SelectSettings) -> bool:
        """Only where A starts from the gradient's directions."""
        return select.gradient_init == "on"

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
        """One rank for a share of the modules that depends on the seed alone.

        Raises:
            InputError: the share selects nothing, or the budget does not pay for rank 1.
        """
        generator = random.Random(seed)
        drawn = {m.module: (generator.random(), 0.0) for m in modules}
        chosen = top_percent(modules, drawn, select.percent, select.scope)
        tiers = dict.fromkeys(chosen, "selected")
        return first_map(self.name, modules, tiers, equal_ranks(modules, chosen, select), {}, select)
