"""qlora, the reference: LoRA on every linear layer of the decoder blocks.

For a weight matrix W (out x in), frozen in 4 bits, an adapter A (r x in), B (out x r) gives

    y = x·Wᵀ + (alpha / r) · x·Aᵀ·Bᵀ          trained parameters: r · (in + out) per matrix

with r = `select.rank` everywhere, or with the rank that `select.budget` pays for.

Source: QLoRA (arXiv 2305.14314), which found that adapters on all linear layers are needed to match full
fine-tuning; LoRA (arXiv 2106.09685).

Later rounds: nothing moves, so there are none. The whole budget of steps is trained in one round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.methods.ranks import check_rank, equal_ranks, first_map
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores

if TYPE_CHECKING:
    from spectraqlora.signals.gradients import GradientSketch


class QLoRA:
    """The method qlora, described above; `catalogue.Method` says what each member is for."""

    name = "qlora"
    summary = (
        "LoRA of one rank on every linear layer, the base in 4 bits: what the others are measured against"
    )
    control = False
    moves = False
    recomputes = False
    colour = "#4c566a"

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
        """The same rank for every module; no signal is read.

        Raises:
            InputError: the budget does not pay for rank 1.
        """
        tiers = {m.module: "all" for m in modules}
        return first_map(self.name, modules, tiers, equal_ranks(modules, tiers, select), {}, select)
