"""The snr-analyze step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import SnrSettings


@step
def run(*, snr_settings: dict[str, Any], outline: Any, four_bit: Any, table: Any) -> None:
    from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze

    inputs = Inputs(
        outline=Path(outline.path), four_bit=Path(four_bit.path) if four_bit is not None else None
    )
    analyze(inputs, SnrSettings(**snr_settings), output_folder(table))
