"""The select-layers step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import FourBitModel, ModelOutline
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import SelectSettings


@step
def run(
    *,
    method: str,
    select_settings: dict[str, Any],
    seed: int,
    four_bit: Any,
    rows: Any,
    table: Any,
    rank_map: Any,
) -> None:
    from spectraqlora.methods.catalogue import method as method_of
    from spectraqlora.steps.select_layers.select import select

    section = SelectSettings(**select_settings)
    with tempfile.TemporaryDirectory() as scratch:
        outline, measurement = Path(scratch) / "outline", Path(scratch) / "measurement"
        manifest = FourBitModel.read(four_bit.path)
        shared = manifest.model_dump(include=set(ModelOutline.model_fields))
        ModelOutline.model_validate(shared).write(outline)
        if method_of(method).measures_gradients(section):
            _measure(Path(four_bit.path), Path(rows.path), section, seed, measurement)
        result = select(
            method, outline, Path(table.path), measurement, section, seed, output_folder(rank_map)
        )
    rank_map.metadata.update(method=method, active=len(result.active()))


def _measure(four_bit: Path, rows: Path, section: SelectSettings, seed: int, output: Path) -> None:
    """Sketch the base model's gradients."""
    from spectraqlora.models.loading import load_four_bit
    from spectraqlora.signals.gradients import write_sketches
    from spectraqlora.signals.scores import calibration_sketches

    model, manifest = load_four_bit(four_bit)
    write_sketches(calibration_sketches(model, manifest.modules, rows, section, seed), output)
