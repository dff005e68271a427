"""The prepare-data step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import DataSettings


@step
def run(source: str, content: str, settings: dict[str, Any], seed: int, tokenizer: Any, data: Any) -> None:
    from spectraqlora.steps.prepare_data.prepare import prepare

    section = DataSettings(**{**settings, "source": source})
    result = prepare(section, Path(tokenizer.path), seed, output_folder(data), content)
    data.metadata.update(digest=result.digest, train_rows=result.train_rows, eval_rows=result.eval_rows)
