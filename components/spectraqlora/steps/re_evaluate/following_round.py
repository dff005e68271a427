"""The round that follows: its rank map, and the adapter carried over to it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from spectraqlora.artifacts import RankMap
from spectraqlora.methods.carry_over import UpdateSpectrum, carry_over
from spectraqlora.methods.catalogue import moving
from spectraqlora.models import adapters
from spectraqlora.runtime.console import say
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import calibration_sketches, module_scores

if TYPE_CHECKING:
    import pandas as pd

    from spectraqlora.signals.gradients import GradientSketch
    from spectraqlora.steps.re_evaluate.evaluate import Inputs, Outputs, Trained


def write_following_round(
    model: Any,
    trained: Trained,
    inputs: Inputs,
    outputs: Outputs,
    select: SelectSettings,
    table: pd.DataFrame,
    spectra: dict[str, UpdateSpectrum],
    seed: int,
) -> list[str]:
    """Write the next rank map and the adapter fitted to it; what moved, in words.

    The task's signal is that of the model as it is now, of every module: what is left to gain there. Modules that enter
    start at random: a start from the directions of that gradient was no better.

    Args:
        model: PEFT model with this round's adapters; they are taken off it.
        trained: this round.
        inputs: for the calibration rows, and the adapter where nothing moves.
        outputs: where the rank map and the adapter go.
        select: the `select` section.
        table: SNR of the updated weights.
        spectra: of the updates, by module.
        seed: of the calibration rows, and of fresh rows in grown adapters.
    """
    current, modules = trained.rank_map, trained.manifest.modules
    sketches: dict[str, GradientSketch] = {}
    if select.needs_gradients:
        say(f"measuring the task's gradients with the adapters of round {current.round}")
        sketches = calibration_sketches(model, modules, inputs.rows, select, seed)
    scores = module_scores(select, modules, table, sketches)
    next_map = moving(current.method).next_ranks(current, modules, scores, spectra, select)
    carried, errors = carry_over(trained.weights, current, next_map, seed)
    next_map = next_map.model_copy(update={"changes": _with_errors(next_map.changes, errors)})
    next_map.write(outputs.next_rank_map)
    moves = _adapters(next_map) != _adapters(current)
    note = f"{len(next_map.changes)} matrices move" if moves else "nothing moves"
    say(f"round {next_map.round} of {current.method}: {note}")
    if not moves:
        shutil.copytree(inputs.adapter, outputs.next_adapter, dirs_exist_ok=True)
    else:
        fitted = adapters.attach(model.unload(), next_map, start=carried)
        adapters.save(fitted, outputs.next_adapter, trained.manifest.source)
        trained.log.write(outputs.next_adapter)
    return next_map.changes


def _adapters(rank_map: RankMap) -> list[tuple[str, int]]:
    """Tier and rank of every module: learning rates alone ask for no other adapter."""
    return [(m.tier, m.rank) for m in rank_map.modules]


def _with_errors(changes: list[str], errors: dict[str, float]) -> list[str]:
    """Notes `module: what moved`, with the relative error where an adapter was shrunk."""
    lines = []
    for line in changes:
        module = line.partition(":")[0]
        lines.append(f"{line} (relative error {errors[module]:.1%})" if module in errors else line)
    return lines
