"""sgm, Spectral Gradient Merging: modules whose gradients share a subspace share the projection onto it.

Mean gradients G of different layers are orthogonal as matrices, and yet their leading singular subspaces overlap on the
side that faces the residual stream: the input of q, k, v, gate and up, the output of o and down. So among hybrid's
selection (per type the best share by signal) similarity is taken per side, with the r leading singular vectors U of
that side, r = `select.rank`:

    similarity(i, j) = ‖Uᵢᵀ Uⱼ‖²_F / r

of modules of the same part of a block (attention, or the MLP: q, k and v read one input, gate and up another; or, with
`select.group_within = block`, of any) within `select.group_layers` neighbouring layers, where it is at least
`select.overlap` and above the largest of 200 pairs of random subspaces of that size. A module that faces the stream on
both sides is compared on the side where it has the closest other. Groups are made by complete linkage: inside a group
every pair is similar.

A group on the input side shares A, which starts from the leading directions of its gradients stacked; B is each
module's own and starts at 0. With `select.group_sides = both` a group on the output side shares B, with the roles
exchanged; that cost more loss than it saved parameters where it was tried. Of a rank-r group with n members sharing
saves (n − 1) · r · width parameters: kept as savings, or with `select.spend_savings` put into a higher rank, up to the
parameters of hybrid.

`select.similarity_of = gradient` is the idea's first reading: modules i and j of the same type and shape with

    similarity(i, j) = <Gᵢ, Gⱼ> / (‖Gᵢ‖·‖Gⱼ‖) ≥ `select.similarity`

estimated from the two-sided sketches, in groups that share the whole pair (A, B).

Source: our own; complete linkage as in scipy.cluster.hierarchy; sketches keep inner products in expectation
(Johnson and Lindenstrauss, 1984), and leading subspaces (Halko, Martinsson and Tropp, arXiv 0909.4061).

Later rounds: groups are made once, nothing moves, so there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectraqlora.artifacts import LinearModule, RankMap, Shared, SideOverlap, Similarity
from spectraqlora.methods.ranks import Group, check_rank, cost, equal_ranks, first_map, top_percent
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores
from spectraqlora.signals.subspaces import side_overlaps

if TYPE_CHECKING:
    import numpy as np

    from spectraqlora.signals.gradients import GradientSketch

_SHARED: dict[str, Shared] = {"input": "A", "output": "B"}
"""The factor that faces the residual stream on a side."""
_APART = 2.0
"""Distance of a pair that may not be in one group; a similar pair's is at most 1."""


class SGM:
    """The method sgm, described above; `catalogue.Method` says what each member is for."""

    name = "sgm"
    summary = (
        "hybrid's selection, in which modules whose gradients share a subspace share that side's LoRA factor"
    )
    control = False
    moves = False
    recomputes = False
    colour = "#2a9d5c"

    def measures_gradients(self, select: SelectSettings) -> bool:
        """Always: the groups are made from them."""
        return True

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
        """One rank for the best share of the modules, with the groups that share factors and their similarity.

        Selected modules without a sketch keep an adapter of their own; where there are no sketches at all that is
        every one, the most that the method can cost.

        Raises:
            InputError: the share selects nothing, or the budget does not pay for rank 1.
        """
        chosen = top_percent(modules, scores, select.percent, select.scope)
        candidates = [m for m in modules if m.module in chosen and m.module in sketches]
        similarity, groups = None, list[Group]()
        if candidates and select.similarity_of == "subspace":
            overlaps = side_overlaps(modules, candidates, sketches, select.rank)
            groups = group_by_overlap(candidates, overlaps, select)
            similarity = Similarity(
                modules=[m.module for m in candidates],
                groups=[list(group.members) for group in groups],
                sides=overlaps,
                threshold=select.overlap,
            )
        elif candidates:
            similarity = group_by_similarity(candidates, sketches, select.similarity)
            groups = [Group(tuple(members)) for members in similarity.groups]
        unshared = select.rank * sum(cost(m) for m in modules if m.module in chosen)
        result = first_map(
            self.name,
            modules,
            dict.fromkeys(chosen, "selected"),
            equal_ranks(modules, chosen, select, groups, unshared if select.spend_savings else 0),
            scores,
            select,
            groups=groups,
        )
        return result.model_copy(update={"similarity": similarity})


def group_by_overlap(
    candidates: list[LinearModule], sides: list[SideOverlap], select: SelectSettings
) -> list[Group]:
    """Groups of two and more modules that share the factor of a side; complete linkage within a part of neighbours.

    Args:
        candidates: the modules, in the model's order.
        sides: their overlaps; a module may be on both.
        select: the lowest overlap inside a group, which is above the side's chance as well, how many neighbouring layers
            it spans at most, and whether it stays within a part of the block.
    """
    import numpy as np

    sides = [side for side in sides if select.group_sides == "both" or side.side == "input"]
    layer_of = {m.module: m.layer for m in candidates}
    part_of = {m.module: m.type.rpartition(".")[0] for m in candidates}
    distances, closest = [], dict[str, tuple[float, str]]()
    for side in sides:
        overlap = np.array(side.overlaps)
        layer = np.array([layer_of[name] for name in side.modules])
        part = np.array([part_of[name] for name in side.modules])
        near = abs(layer[:, None] - layer[None, :]) < select.group_layers
        near &= (part[:, None] == part[None, :]) | (select.group_within == "block")
        similar = near & (overlap >= select.overlap) & (overlap > side.chance)
        distance = np.where(similar, 1 - overlap, _APART)
        np.fill_diagonal(distance, _APART)
        for name, nearest in zip(side.modules, distance.min(1), strict=True):
            closest[name] = min(closest.get(name, (_APART, "")), (float(nearest), side.side))
        distances.append(distance)
    groups = []
    for side, distance in zip(sides, distances, strict=True):
        here = [i for i, name in enumerate(side.modules) if closest[name][1] == side.side]
        if not here:
            continue
        labels = _complete_linkage(distance[np.ix_(here, here)], 1.0)
        for label in dict.fromkeys(labels):
            members = [side.modules[i] for i, own in zip(here, labels, strict=True) if own == label]
            if len(members) > 1:
                groups.append(Group(tuple(members), _SHARED[side.side]))
    return groups


def group_by_similarity(
    modules: list[LinearModule], sketches: Mapping[str, GradientSketch], threshold: float
) -> Similarity:
    """Complete-linkage groups: inside a group every pair's gradient cosine is at least `threshold`.

    Only modules of the same type and shape are compared; other pairs stand as None in the matrix.

    Args:
        modules: what to group, each with a sketch.
        sketches: by module; the two-sided ones (k x k) are compared.
        threshold: lowest cosine, -1 to 1.
    """
    import torch

    kinds: dict[tuple[str, int, int], list[int]] = {}
    for index, info in enumerate(modules):
        kinds.setdefault((info.type, info.out_features, info.in_features), []).append(index)
    cosines: list[list[float | None]] = [[None] * len(modules) for _ in modules]
    groups: list[list[str]] = []
    for members in kinds.values():
        flat = torch.stack([sketches[modules[i].module].sketch.flatten() for i in members])
        unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
        matrix = (unit @ unit.T).clamp(-1, 1).double().numpy()
        for row, i in enumerate(members):
            for column, j in enumerate(members):
                cosines[i][j] = round(float(matrix[row, column]), 6)
        labels = _complete_linkage(1 - matrix, 1 - threshold)
        for label in sorted(set(labels)):
            groups.append([modules[i].module for i, own in zip(members, labels, strict=True) if own == label])
    return Similarity(
        modules=[m.module for m in modules], cosines=cosines, groups=groups, threshold=threshold
    )


def _complete_linkage(distance: np.ndarray, largest: float) -> list[int]:
    """A label for each of n members, from their distances (n x n): the same where all pairs are within `largest`."""
    import numpy as np
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(distance) == 1:
        return [1]
    distance = np.clip(distance, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform((distance + distance.T) / 2, checks=False), method="complete")
    return list(fcluster(tree, t=largest, criterion="distance"))
