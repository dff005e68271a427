"""The select-layers step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import SelectSettings


@step
def run(
    *,
    method: str,
    select_settings: dict[str, Any],
    seed: int,
    outline: Any,
    table: Any,
    measurement: Any,
    rank_map: Any,
) -> None:
    from spectraqlora.steps.select_layers.select import Inputs, select

    inputs = Inputs(outline=Path(outline.path), table=Path(table.path), measurement=Path(measurement.path))
    result = select(method, inputs, SelectSettings(**select_settings), seed, output_folder(rank_map))
    rank_map.metadata.update(method=method, active=len(result.active()))
