"""Spectral Gradient Merging: which modules are similar enough to share one LoRA pair."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from spectraqlora.artifacts import LinearModule, Similarity
from spectraqlora.signals.gradients import GradientSketch


def group_by_similarity(
    modules: list[LinearModule], sketches: dict[str, GradientSketch], threshold: float
) -> Similarity:
    """Complete-linkage groups: inside a group every pair's gradient cosine is at least `threshold`.

    Only modules of the same type and shape are compared; other pairs stand as None in the matrix.
    """
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
        labels = [1]
        if len(members) > 1:
            distance = np.clip(1 - matrix, 0, None)
            np.fill_diagonal(distance, 0)
            tree = linkage(squareform((distance + distance.T) / 2, checks=False), method="complete")
            labels = list(fcluster(tree, t=1 - threshold, criterion="distance"))
        for label in sorted(set(labels)):
            groups.append([modules[i].module for i, own in zip(members, labels, strict=True) if own == label])
    return Similarity(modules=[m.module for m in modules], cosines=cosines, groups=groups)
