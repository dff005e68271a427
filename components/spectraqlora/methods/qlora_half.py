"""qlora_half, a control: as many parameters as hybrid, spread over every linear layer, from the same start.

LoRA on every linear layer of the decoder blocks, as qlora, of the rank that the P parameters pay for that hybrid trains
with the same settings:

    r = floor(P / Σ (in + out))        with half of the matrices at rank 16, about 8 everywhere

What that leaves over goes to the first matrices of the model, one rank each, while it pays for them. A starts where
hybrid's does. What hybrid gains over qlora is due to its choice of matrices only where it beats this one too: otherwise
a smaller rank, or the start, gains the same.

Source: QLoRA (arXiv 2305.14314); the control of a comparison at equal parameters.

Later rounds: nothing moves, so there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.methods.hybrid import Hybrid
from spectraqlora.methods.ranks import cost, first_map, trained_parameters
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores

if TYPE_CHECKING:
    from spectraqlora.signals.gradients import GradientSketch

_HYBRID = Hybrid()


class QLoRAHalf:
    """The method qlora_half, described above; `catalogue.Method` says what each member is for."""

    name = "qlora_half"
    summary = (
        "a control: qlora with as many parameters as hybrid and the same start; compared, never the winner"
    )
    control = True
    moves = False
    recomputes = False
    colour = "#93a1b8"

    def measures_gradients(self, select: SelectSettings) -> bool:
        """Where hybrid does: for its choice, whose parameters are counted, and for the start."""
        return _HYBRID.measures_gradients(select)

    def check(self, modules: list[LinearModule], select: SelectSettings) -> None:
        """Refuse what hybrid refuses (InputError)."""
        _HYBRID.check(modules, select)

    def first_ranks(
        self,
        modules: list[LinearModule],
        scores: Scores,
        select: SelectSettings,
        seed: int,
        sketches: Mapping[str, GradientSketch],
    ) -> RankMap:
        """Nearly equal ranks everywhere that cost what hybrid's first round costs, at most.

        Raises:
            InputError: hybrid would select nothing, or the budget does not pay for rank 1.
        """
        hybrid = _HYBRID.first_ranks(modules, scores, select, seed, sketches)
        parameters = trained_parameters(hybrid.modules, modules)
        rank, left = divmod(parameters, sum(map(cost, modules)))
        ranks = {}
        for info in modules:
            more = cost(info) <= left
            left -= cost(info) * more
            ranks[info.module] = min(rank + more, info.in_features, info.out_features)
        chosen = {name: rank for name, rank in ranks.items() if rank}
        return first_map(self.name, modules, dict.fromkeys(chosen, "all"), chosen, {}, select)
