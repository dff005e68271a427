"""How much the leading gradient subspaces of modules overlap, on the side that faces the residual stream.

With the r leading singular vectors U (width x r, orthonormal) of two modules' mean gradients on that side,

    overlap(i, j) = ‖Uᵢᵀ Uⱼ‖²_F / r

is 1 for equal subspaces and r / width on average for random ones. Subspaces come from the sketches: the left singular
vectors of Gᵀ P on the input side, of G Q on the output side (see gradients).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from spectraqlora.artifacts import LinearModule, SideOverlap
from spectraqlora.models.modules import residual_width

if TYPE_CHECKING:
    import torch

    from spectraqlora.signals.gradients import GradientSketch

_DRAWS = 200
"""Pairs of random subspaces of which the largest overlap is what chance explains."""


def side_overlaps(
    modules: list[LinearModule],
    candidates: list[LinearModule],
    sketches: Mapping[str, GradientSketch],
    rank: int,
) -> list[SideOverlap]:
    """Overlaps between all candidates that face the residual stream on a side, for each side where two do.

    Args:
        modules: all of the model, from which the width of its residual stream is read.
        candidates: what to compare; those without a sketch are left out.
        sketches: by module.
        rank: r; no more than a sketch's side.
    """
    width = residual_width(modules)
    facing: dict[Literal["input", "output"], dict[str, torch.Tensor]] = {"input": {}, "output": {}}
    for info in candidates:
        sketch = sketches.get(info.module)
        if sketch is None:
            continue
        if info.in_features == width:
            facing["input"][info.module] = sketch.range_sketch
        if info.out_features == width and sketch.output_sketch is not None:
            facing["output"][info.module] = sketch.output_sketch
    return [_overlaps(side, sides, rank) for side, sides in facing.items() if len(sides) > 1]


def _overlaps(side: Literal["input", "output"], sides: Mapping[str, torch.Tensor], rank: int) -> SideOverlap:
    import torch

    width = next(iter(sides.values())).shape[0]
    rank = min(rank, *(sketch.shape[1] for sketch in sides.values()))
    bases = torch.stack(
        [torch.linalg.svd(s.float(), full_matrices=False)[0][:, :rank] for s in sides.values()]
    )
    # One module against all at a time: all against all at once would be (modules · r)² numbers.
    rows = [(torch.einsum("wr,nws->nrs", basis, bases) ** 2).sum((1, 2)) / rank for basis in bases]
    overlaps = [[round(float(value), 4) for value in row] for row in rows]
    return SideOverlap(side=side, modules=list(sides), overlaps=overlaps, chance=chance_overlap(width, rank))


def chance_overlap(width: int, rank: int, draws: int = _DRAWS) -> float:
    """The largest overlap of `draws` pairs of uniformly random rank-dimensional subspaces of that width; always the same.

    Args:
        width: dimension of the space.
        rank: of the subspaces, at most `width`.
        draws: how many pairs.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def basis() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(width, rank, generator=generator))[0]

    return max(round(float(((basis().T @ basis()) ** 2).sum()) / rank, 4) for _ in range(draws))
