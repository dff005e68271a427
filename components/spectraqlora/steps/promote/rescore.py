"""Scoring registered models once more: on given rows, and on general text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spectraqlora.errors import InputError
from spectraqlora.files import file_digest
from spectraqlora.models.families import context_length
from spectraqlora.places import file_place
from spectraqlora.scoring.loss import accuracy, score
from spectraqlora.settings import EvaluateSettings

GUARD_TOKENS = 512
_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def rescore(
    model: Any, tokenizer: Any, rows: Any, answers: list[dict[str, str]], settings: EvaluateSettings
) -> dict[str, float]:
    """Loss, perplexity and, where there are answers, accuracy of a model on tokenized rows."""
    measured = score(model, rows, settings.batch_size)
    numbers = {
        "merged_eval_loss": measured.loss,
        "eval_loss": measured.loss,
        "perplexity": measured.perplexity,
    }
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


def _texts(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    from datasets import load_dataset

    loaded = load_dataset(_KINDS[path.suffix], data_files=str(path), split="train", keep_in_memory=True)
    if "text" not in loaded.column_names:
        raise InputError("promote.guard_data", path, "a column `text`")
    return [str(text) for text in loaded["text"] if text]
