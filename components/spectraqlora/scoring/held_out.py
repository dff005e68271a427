"""The rows a model was scored on, kept beside it so that a later one can be scored on the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import write_text
from spectraqlora.scoring.batches import load_rows

_ROWS, _ANSWERS = "rows.parquet", "answers.json"


def rows_digest(rows: Any) -> str:
    """SHA-256 over the token ids and labels of tokenized rows, in hex."""
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return content.hexdigest()


def write_eval_rows(data: Path, folder: Path) -> str:
    """Write the eval split of prepared data, with the answers that are scored; returns its digest."""
    rows = load_rows(data, "held_out")
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / _ROWS))
    write_text(folder / _ANSWERS, json.dumps(PreparedRows.read(data).answers))
    return rows_digest(rows)


def read_eval_rows(folder: Path) -> tuple[Any, list[dict[str, str]]]:
    """Tokenized rows and the answers among them, as written by `write_eval_rows`."""
    from datasets import Dataset

    try:
        rows = Dataset.from_parquet(str(folder / _ROWS), keep_in_memory=True)
        return rows, json.loads((folder / _ANSWERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError("eval rows", folder, f"{_ROWS} and {_ANSWERS}, whole") from None
