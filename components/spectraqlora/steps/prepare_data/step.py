"""The prepare-data step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import data_section


@step
def run(
    *, source: str, content: str, data_settings: dict[str, Any], seed: int, outline: Any, rows: Any
) -> None:
    from spectraqlora.steps.prepare_data.prepare import prepare

    section = data_section(data_settings, source)
    result = prepare(section, Path(outline.path), seed, output_folder(rows), content)
    rows.metadata.update(digest=result.digest, train_rows=result.train_rows, eval_rows=result.eval_rows)
