"""Scoring registered models once more: on given rows, and on general text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from spectraqlora.data.files import DataFile, read_rows
from spectraqlora.errors import InputError
from spectraqlora.files import file_digest
from spectraqlora.models.families import context_length
from spectraqlora.places import file_place
from spectraqlora.scoring.loss import accuracy, score
from spectraqlora.settings import EvaluateSettings

GUARD_TOKENS = 512
_KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")


def rescore(
    model: Any,
    tokenizer: Any,
    rows: Any,
    answers: list[dict[str, str]],
    settings: EvaluateSettings,
    test: Any = None,
) -> dict[str, float]:
    """A model's loss and perplexity on tokenized rows and, where there are any, accuracy and loss on the test rows."""
    measured = score(model, rows, settings.batch_size)
    numbers = {
        "merged_eval_loss": measured.loss,
        "eval_loss": measured.loss,
        "perplexity": measured.perplexity,
    }
    if test is not None:
        numbers["merged_test_loss"] = score(model, test, settings.batch_size).loss
    chosen = answers[: settings.accuracy_rows]
    if chosen:
        exact = accuracy(model, tokenizer, chosen, settings.max_new_tokens, settings.batch_size)
        if exact is not None:
            numbers["accuracy"] = exact
    return numbers


def guard_file(source: str) -> Path:
    """The file of general text; refuses what is missing or of unknown kind."""
    field = "promote.guard_data"
    if Path(source).suffix not in _KINDS:
        raise InputError(field, source, f"a file, here or at s3://, of these: {', '.join(_KINDS)}")
    path = file_place(source, field).local_copy()
    if not path.is_file() or path.stat().st_size == 0:
        raise InputError(field, source, "a file with text; this is empty or a folder")
    return path


def guard_digest(source: str, rows: int) -> str:
    """Digest of the general text as it is used."""
    return f"{file_digest(guard_file(source))}:{rows}"


def guard_perplexity(model: Any, tokenizer: Any, source: str, limit: int, batch_size: int) -> float:
    """Perplexity per token on general text, cut into full sequences.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        source: a text file, or data with a `text` column.
        limit: most sequences to score.
        batch_size: sequences per forward pass.
    """
    texts = _texts(guard_file(source))
    length = min(GUARD_TOKENS, context_length(model.config) or GUARD_TOKENS)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= limit * length:
            break
    rows = [ids[i : i + length] for i in range(0, len(ids), length)][:limit]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InputError("promote.guard_data", source, "text of more than one token")
    with torch.no_grad():
        return score(model, [{"input_ids": row, "labels": list(row)} for row in rows], batch_size).perplexity


def _texts(path: Path) -> Iterator[str]:
    """The file's text, or those of its rows, one at a time."""
    if path.suffix == ".txt":
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError("promote.guard_data", path, "text in UTF-8") from None
        return

    def opened() -> BinaryIO:
        return open(path, "rb")

    file = DataFile(str(path), path.suffix, "", opened)
    for number, row in read_rows(file, wanted=["text"]):
        text = row.get("text")
        if text is not None and not isinstance(text, str):
            raise InputError(f"promote.guard_data, row {number}", text, "text in the column `text`")
        if "text" not in row:
            raise InputError("promote.guard_data", path, f"a column `text`; row {number} has none")
        if text:
            yield text
