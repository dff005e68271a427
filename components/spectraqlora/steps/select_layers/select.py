"""The step's work: from the SNR table and the measured gradients to a method's rank map. No model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectraqlora.artifacts import GRADIENT_INIT, BaseMeasurement, ModelOutline, RankMap
from spectraqlora.errors import InputError
from spectraqlora.files import write_text
from spectraqlora.methods.catalogue import Method, method
from spectraqlora.runtime.console import say
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import module_scores
from spectraqlora.snr.table import read_table

if TYPE_CHECKING:
    from spectraqlora.signals.gradients import GradientSketch


@dataclass(frozen=True)
class Inputs:
    """The folders that the step reads; of the measurement the sketches, where the method needs them."""

    outline: Path
    table: Path
    measurement: Path


def select(name: str, inputs: Inputs, select_settings: SelectSettings, seed: int, output: Path) -> RankMap:
    """Write `rank_map.json`, the selected modules' names, and what the method groups and starts its adapters by.

    The same inputs give the same files: nothing is measured here.

    Args:
        name: the method.
        inputs: what is read.
        select_settings: the settings.
        seed: of what a method draws.
        output: folder of the rank map: `rank_map.json`, `selected.txt`, `similarity.json` where modules were grouped,
            `a_init.safetensors` where A starts from the gradient's directions.

    Raises:
        InputError: a rank does not fit the model, nothing would be trained, sketches are missing, or the
            measurement is that of another base model.
    """
    chosen = method(name)
    manifest, measurement = ModelOutline.read(inputs.outline), BaseMeasurement.read(inputs.measurement)
    measurement.check_origin(manifest.base_digest)
    chosen.check(manifest.modules, select_settings)
    sketches = _sketches(chosen, inputs.measurement, select_settings)
    scores = module_scores(select_settings, manifest.modules, read_table(inputs.table), sketches)
    rank_map = chosen.first_ranks(manifest.modules, scores, select_settings, seed, sketches)
    rank_map = rank_map.model_copy(update={"base_digest": manifest.base_digest})
    if sketches and select_settings.gradient_init != "off":
        from safetensors.torch import save_file

        from spectraqlora.signals.gradients import starting_directions

        save_file(starting_directions(sketches, rank_map), output / GRADIENT_INIT)
    active = rank_map.active()
    write_text(output / "selected.txt", "\n".join(m.module for m in active) + "\n")
    rank_map.write(output)
    say(f"{name}: {len(active)} of {len(manifest.modules)} matrices get adapters")
    return rank_map


def _sketches(
    chosen: Method, measurement: Path, select_settings: SelectSettings
) -> Mapping[str, GradientSketch]:
    """The sketches that the method needs; none where it needs none, whatever was measured for others."""
    if not chosen.measures_gradients(select_settings):
        return {}
    from spectraqlora.signals.gradients import SKETCHES, read_sketches

    sketches = read_sketches(measurement)
    if not sketches:
        raise InputError(
            "measurement",
            measurement / SKETCHES,
            f"gradient sketches, which {chosen.name} needs with these settings; "
            f"run measure-base again with {chosen.name} among its methods and the same select settings",
        )
    return sketches
