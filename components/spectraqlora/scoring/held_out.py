"""The rows a model was scored on, kept next to it so that a later one can be scored on the same; and the test rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import write_text
from spectraqlora.scoring.batches import load_rows
from spectraqlora.scoring.loss import Score, score

_ROWS, _ANSWERS, _TEST = "rows.parquet", "answers.json", "test.parquet"


def rows_digest(rows: Any) -> str:
    """SHA-256 over the token ids and labels of tokenized rows, in hex."""
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return content.hexdigest()


def write_held_out(prepared: Path, folder: Path) -> dict[str, str]:
    """Write the held-out and the test rows among prepared ones, with the answers that are scored.

    Returns:
        Digests by the tags that a version has them in: `eval_digest` and, where there are test rows, `test_digest`.
    """
    rows, manifest = load_rows(prepared, "held_out"), PreparedRows.read(prepared)
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / _ROWS))
    write_text(folder / _ANSWERS, json.dumps(manifest.answers))
    digests = {"eval_digest": rows_digest(rows)}
    if manifest.test_rows:
        test = load_rows(prepared, "test")
        test.to_parquet(str(folder / _TEST))
        digests["test_digest"] = rows_digest(test)
    return digests


def read_held_out(folder: Path) -> tuple[Any, list[dict[str, str]]]:
    """Tokenized rows and the answers among them, as written by `write_held_out`.

    Raises:
        InputError: they are missing or cut short.
    """
    from datasets import Dataset

    try:
        rows = Dataset.from_parquet(str(folder / _ROWS), keep_in_memory=True)
        return rows, json.loads((folder / _ANSWERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError("held-out rows", folder, f"{_ROWS} and {_ANSWERS}, complete") from None


def read_test_rows(folder: Path) -> Any | None:
    """The tokenized test rows beside the held-out ones; None where there are none.

    Raises:
        InputError: they are cut short.
    """
    from datasets import Dataset

    if not (folder / _TEST).is_file():
        return None
    try:
        return Dataset.from_parquet(str(folder / _TEST), keep_in_memory=True)
    except (OSError, ValueError):
        raise InputError("test rows", folder, f"{_TEST}, complete") from None


def score_test_rows(model: Any, prepared: Path, batch_size: int) -> Score | None:
    """Losses of the test rows, which chose neither checkpoint nor winner; none where there are no such rows.

    Args:
        model: language model.
        prepared: prepared rows artifact.
        batch_size: rows per forward pass.

    Raises:
        InputError: the rows are missing or cut short.
    """
    manifest = PreparedRows.read(prepared)
    if not manifest.test_rows:
        return None
    return score(model, load_rows(prepared, "test"), batch_size, packing=manifest.shared_sequences)
