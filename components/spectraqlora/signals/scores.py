"""What orders modules: the weights' own signal, the task's, or both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.artifacts import LinearModule
from spectraqlora.settings import SelectSettings

if TYPE_CHECKING:
    import pandas as pd

    from spectraqlora.signals.gradients import GradientSketch

Scores = dict[str, tuple[float, float]]
"""Per module its signal value and a tie-breaker; modules without one are never selected."""


SIGNAL_WORDS = {
    "spectrum": "SNR",
    "energy": "gradient energy",
    "gradient_snr": "gradient SNR",
    "combined": "SNR and gradient energy",
}
"""What a module's signal is called in sentences, by `select.signal`."""


def amplitude(score: tuple[float, float], signal: str) -> float:
    """A module's signal on a scale that modules of different types share, 0 or above.

    Weight SNR is comparable across types once it is calibrated, which its tie-breaker is. The task's signals are
    squares of an amplitude.

    Args:
        score: the module's, as `module_scores` gives it.
        signal: `select.signal`.
    """
    return max(score[1], 0.0) if signal == "spectrum" else max(score[0], 0.0) ** 0.5


def weight_scores(table: pd.DataFrame, across_types: bool = False) -> Scores:
    """The table's order (SNR), ties by the calibrated value; across types the calibrated value, which shapes do not move.

    Args:
        table: SNR table, a row per module; a row whose SNR is NaN is no candidate.
        across_types: whether modules of different types are compared.

    Source: Spectrum (arXiv 2406.06623); the calibration is described in snr/marchenko_pastur.py.
    """
    return {
        row.module: (calibrated if across_types else float(row.order), calibrated)
        for row in table.itertuples()
        if not math.isnan(row.snr)
        for calibrated in [float(row.calibrated) if math.isfinite(row.calibrated) else 0.0]
    }


def task_scores(
    signal: str, modules: list[LinearModule], sketches: Mapping[str, GradientSketch], rank: int
) -> Scores:
    """The task's signal of every sketched module; the other of the two breaks ties.

    Args:
        signal: "energy", the sum of the `rank` largest squared singular values of the mean gradient over the
            parameters that an adapter of that rank costs, rank · (in + out); or "gradient_snr", the squared norm of
            the mean gradient over the variance of the batches' gradients.
        modules: what to score.
        sketches: by module.
        rank: r of the energy.
    """
    scores: Scores = {}
    for info in modules:
        if info.module in sketches:
            sketch = sketches[info.module]
            energy = sketch.energy(rank) / (rank * (info.in_features + info.out_features))
            pair = (energy, sketch.gradient_snr)
            scores[info.module] = pair if signal == "energy" else pair[::-1]
    return scores


def combined(first: Scores, second: Scores) -> Scores:
    """Mean of both places, 0 (worst) to 1 (best) each; ties by the second."""

    def places(scores: Scores) -> dict[str, float]:
        ordered = sorted(scores, key=lambda name: scores[name])
        return {name: place / max(len(ordered) - 1, 1) for place, name in enumerate(ordered)}

    one, two = places(first), places(second)
    return {name: ((one[name] + two[name]) / 2, two[name]) for name in one.keys() & two.keys()}


def module_scores(
    select: SelectSettings,
    modules: list[LinearModule],
    table: pd.DataFrame,
    sketches: Mapping[str, GradientSketch],
) -> Scores:
    """Scores by `select.signal`; modules that it says nothing of have none.

    Args:
        select: the signal, the scope, and the rank that the energy is for.
        modules: all of the model.
        table: SNR table.
        sketches: by module; empty where the signal is the weights' or nothing was measured.
    """
    across = select.scope == "all"
    if select.signal == "spectrum":
        return weight_scores(table, across)
    if select.signal == "combined":
        energy = task_scores("energy", modules, sketches, select.rank)
        return combined(weight_scores(table, across_types=True), energy)
    return task_scores(select.signal, modules, sketches, select.rank)


def calibration_sketches(
    model: Any, modules: list[LinearModule], rows: Path, select: SelectSettings, seed: int
) -> dict[str, GradientSketch]:
    """Gradient sketches over a few batches of training rows, the same rows for every round.

    Args:
        model: language model, frozen; it may be 4-bit and hold adapters.
        modules: the modules to measure.
        rows: prepared rows artifact.
        select: how many batches, rows in each, and the sketches' side.
        seed: of the choice of rows and of the projections.
    """
    from spectraqlora.scoring.batches import Collator, load_rows
    from spectraqlora.signals.gradients import sketch_gradients

    train = load_rows(rows, "train").shuffle(seed=seed)
    batches = Collator.of(model.config).batches(
        train, select.calibration_rows, limit=select.calibration_batches
    )
    return sketch_gradients(model, modules, batches, select.sketch_size, seed)
