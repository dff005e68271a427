"""The merge-export step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import EvaluateSettings, ExportSettings


@step
def run(
    *,
    evaluate_settings: dict[str, Any],
    export_settings: dict[str, Any],
    four_bit: Any,
    rows: Any,
    winner: Any,
    exported: Any,
) -> None:
    from spectraqlora.steps.merge_export.merge import Inputs, merge_export

    result = merge_export(
        Inputs(four_bit=Path(four_bit.path), rows=Path(rows.path), winner=Path(winner.path)),
        EvaluateSettings(**evaluate_settings),
        output_folder(exported),
        ExportSettings(**export_settings),
    )
    exported.metadata.update(method=result.method, merged_into=result.merged_into, **result.published)
