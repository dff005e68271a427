"""The select-layers step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import SelectSettings


@step
def run(
    method: str, settings: dict[str, Any], seed: int, quantized: Any, data: Any, table: Any, ranks: Any
) -> None:
    from spectraqlora.steps.select_layers.select import select

    section = SelectSettings(**settings)
    result = select(
        method, Path(quantized.path), Path(data.path), Path(table.path), section, seed, output_folder(ranks)
    )
    ranks.metadata.update(method=method, active=len(result.active()))
