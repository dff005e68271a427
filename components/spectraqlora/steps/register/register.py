"""The winner in the MLflow model registry, as challenger."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import Evaluation, MergedModel
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.scoring.held_out import read_eval_rows, write_eval_rows
from spectraqlora.tracking.registered_model import log_model
from spectraqlora.tracking.registry import ADAPTER, CHALLENGER, EVAL_ROWS, Registry
from spectraqlora.tracking.runs import Tracker

_NEW_TOKENS = 16


def register(
    tracker: Tracker,
    exported: Path,
    winner: Path,
    data: Path,
    tags: dict[str, str],
    metrics: dict[str, float],
) -> tuple[str, int]:
    """Log the exported model to the pipeline's run and register it; (model name, version).

    Beside the model the run keeps the adapter with its rank map and the rows it was scored on: what a later
    champion is compared on and may start from. A version of the same run with the same tag `merged_digest`
    is not registered twice.

    Args:
        tracker: of the pipeline run.
        exported: artifact of merge-export.
        winner: artifact of compare, with adapter and evaluation.
        data: prepared data.
        tags: of the version.
        metrics: its numbers, tags as well.
    """
    settings = tracker.settings
    registry, run_id = Registry(settings), tracker.pipeline_run()
    tags = {**tags, "registered_form": settings.registered_form}
    for known in registry.versions():
        same = ("merged_digest", "registered_form")
        if known.run_id == run_id and all(known.tags.get(key) == tags[key] for key in same):
            return settings.registered_model, known.number
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / EVAL_ROWS
        tags["eval_digest"] = write_eval_rows(data, rows)
        tracker.log_folder(run_id, rows, EVAL_ROWS)
        trust = MergedModel.read(exported).trust_remote_code
        tokenizer = load_tokenizer(exported / "merged", trust)
        example = _example(rows, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        Evaluation.read(winner).rounds[-1].rank_map.write(scratch)
        tracker.log_folder(run_id, winner / "adapter", ADAPTER)
        tracker.log_folder(run_id, Path(scratch), ADAPTER)
    number = log_model(settings, run_id, exported, tokenizer, example, trust)
    tags["tokenizer_digest"] = vocabulary_digest(tokenizer)
    registry.tag(number, {**tags, **{name: f"{value:.9g}" for name, value in metrics.items()}})
    # Only now is the version whole; whoever looks for the challenger finds one with its numbers.
    registry.set_alias(CHALLENGER, number)
    return settings.registered_model, number


def _example(rows: Path, tokenizer: Any) -> str:
    """A prompt as the model was trained on it: of a scored answer, or the start of a row."""
    scored, answers = read_eval_rows(rows)
    if answers:
        return answers[0]["prompt"]
    return str(tokenizer.decode(scored[0]["input_ids"][:_NEW_TOKENS], skip_special_tokens=True)) or "Hello"


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's vocabulary: where it is equal, losses per token compare."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
