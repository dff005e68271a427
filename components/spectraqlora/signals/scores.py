"""What ranks modules: the weights' own signal, the task's, or both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.artifacts import LinearModule
from spectraqlora.settings import SelectSettings
from spectraqlora.snr.table import read_table

if TYPE_CHECKING:
    import pandas as pd

    from spectraqlora.signals.gradients import GradientSketch

Scores = dict[str, tuple[float, float]]
"""Per module (score, tie-breaker); modules without one are never selected."""


def weight_scores(table: pd.DataFrame, across_types: bool = False) -> Scores:
    """Raw SNR, ties by the calibrated value; across types the calibrated value, which shapes do not move.

    NaN is no candidate.
    """
    return {
        row.module: (calibrated if across_types else float(row.snr), calibrated)
        for row in table.itertuples()
        if not math.isnan(row.snr)
        for calibrated in [float(row.calibrated) if math.isfinite(row.calibrated) else 0.0]
    }


def task_scores(
    signal: str, modules: list[LinearModule], sketches: Mapping[str, GradientSketch], rank: int
) -> Scores:
    """The task's signal of every sketched module.

    energy: sum of the `rank` largest squared singular values of the mean gradient, over the parameters that
        an adapter of that rank costs.
    gradient_snr: squared norm of the mean gradient over the variance of the batches' gradients.
    """
    found: Scores = {}
    for info in modules:
        if info.module in sketches:
            sketch = sketches[info.module]
            energy = sketch.energy(rank) / (rank * (info.in_features + info.out_features))
            pair = (energy, sketch.gradient_snr)
            found[info.module] = pair if signal == "energy" else pair[::-1]
    return found


def combined(first: Scores, second: Scores) -> Scores:
    """Mean of both places, 0 (worst) to 1 (best) each; ties by the second."""

    def places(scores: Scores) -> dict[str, float]:
        ordered = sorted(scores, key=lambda name: scores[name])
        return {name: place / max(len(ordered) - 1, 1) for place, name in enumerate(ordered)}

    one, two = places(first), places(second)
    return {name: ((one[name] + two[name]) / 2, two[name]) for name in one.keys() & two.keys()}


def module_scores(
    settings: SelectSettings,
    modules: list[LinearModule],
    table: pd.DataFrame,
    sketches: Mapping[str, GradientSketch],
) -> Scores:
    """Scores by `select.signal`; `sketches` may be empty where the signal is that of the weights."""
    across = settings.scope == "all"
    if settings.signal == "spectrum":
        return weight_scores(table, across)
    if settings.signal == "combined":
        energy = task_scores("energy", modules, sketches, settings.rank)
        return combined(weight_scores(table, across_types=True), energy)
    return task_scores(settings.signal, modules, sketches, settings.rank)


def calibration_sketches(
    model: Any, modules: list[LinearModule], data: Path, settings: SelectSettings, seed: int
) -> dict[str, GradientSketch]:
    """Gradient sketches over a few batches of training rows, the same rows for every method and round."""
    from spectraqlora.scoring.batches import Collator, load_rows
    from spectraqlora.signals.gradients import sketch_gradients

    rows = load_rows(data, "train").shuffle(seed=seed)
    batches = Collator.of(model.config).batches(
        rows, settings.calibration_rows, limit=settings.calibration_batches
    )
    return sketch_gradients(model, modules, batches, settings.sketch_size, seed)


def stored_scores(folder: Path, across_types: bool = False) -> Scores:
    """Weight scores of a stored SNR table."""
    return weight_scores(read_table(folder), across_types)
