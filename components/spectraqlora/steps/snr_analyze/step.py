"""The snr-analyze step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import SnrSettings


@step
def run(*, snr_settings: dict[str, Any], outline: Any, table: Any) -> None:
    from spectraqlora.steps.snr_analyze.analyze import analyze

    analyze(SnrSettings(**snr_settings), Path(outline.path), output_folder(table))
