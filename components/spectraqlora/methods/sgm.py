"""sgm, Spectral Gradient Merging: modules whose gradients point the same way share one LoRA pair.

Among hybrid's selection (per type the best share by signal), for two modules i and j of the same type and shape
with mean gradients G of a few calibration batches:

    similarity(i, j) = <Gᵢ, Gⱼ> / (‖Gᵢ‖·‖Gⱼ‖)

is estimated from the two-sided sketches (see signals/gradients.py). Groups are made by complete linkage: inside a
group every pair's cosine is at least `select.similarity`. A group shares one pair (A, B), which costs once:
r · (in + out) for the whole group, so that a budget buys a higher rank.

Source: our own; complete linkage as in scipy.cluster.hierarchy; sketches keep inner products in expectation
(Johnson and Lindenstrauss, 1984).

Later rounds: groups are made once, nothing moves, so there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectraqlora.artifacts import LinearModule, RankMap, Similarity
from spectraqlora.methods.ranks import check_rank, equal_ranks, first_map, top_percent
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import Scores

if TYPE_CHECKING:
    import numpy as np

    from spectraqlora.signals.gradients import GradientSketch


class SGM:
    """The method sgm, described above; `catalogue.Method` says what each member is for."""

    name = "sgm"
    summary = "hybrid's selection, in which modules with similar gradients share one LoRA pair"
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
        """One rank for the best share of the modules, with the groups that share a pair and their similarity.

        Selected modules without a sketch keep a pair of their own; where there are no sketches at all that is every
        one, the most that the method can cost.

        Raises:
            InputError: the share selects nothing, or the budget does not pay for rank 1.
        """
        chosen = top_percent(modules, scores, select.percent, select.scope)
        candidates = [m for m in modules if m.module in chosen and m.module in sketches]
        similarity = group_by_similarity(candidates, sketches, select.similarity) if candidates else None
        groups = similarity.groups if similarity else []
        result = first_map(
            self.name,
            modules,
            dict.fromkeys(chosen, "selected"),
            equal_ranks(modules, chosen, select, groups),
            scores,
            select,
            groups=groups,
        )
        return result.model_copy(update={"similarity": similarity})


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
    return Similarity(modules=[m.module for m in modules], cosines=cosines, groups=groups)


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
