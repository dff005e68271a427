"""The winner in the MLflow model registry, as challenger."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, MergedModel
from spectraqlora.files import folder_digest
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.runtime.images import REVISION
from spectraqlora.scoring.held_out import read_held_out, write_held_out
from spectraqlora.tracking.needs import EXPORT, PUBLISHED
from spectraqlora.tracking.registered_model import log_model, register_model
from spectraqlora.tracking.registry import (
    ADAPTER,
    CHALLENGER,
    COMPLETING_TAG,
    HELD_OUT,
    OWN_TAG,
    TEST_LOSS,
    Registry,
)
from spectraqlora.tracking.runs import Tracker
from spectraqlora.tracking.signed_model import SIGNED_BY, keep_signature

_NEW_TOKENS = 16


@dataclass(frozen=True)
class Inputs:
    """The folders that the step reads, and the address of the exported one's artifact."""

    rows: Path
    winner: Path
    exported: Path
    export_uri: str = ""


def register(tracker: Tracker, inputs: Inputs, origin: dict[str, str]) -> tuple[str, int]:
    """Log the exported model to the pipeline's run and register it; (model name, version).

    Next to the model the run keeps the adapter with its rank map and the rows it was scored on: what a later
    champion is compared on and may start from. A stop at any request leaves either no version or one that a
    retry finds by its run and digest and completes: a run never registers the same model twice, and the alias
    `challenger` is the last thing that is written.

    Args:
        tracker: of the pipeline run.
        inputs: the step's folders.
        origin: further tags, which say what the model was trained on and with which settings.

    Raises:
        InputError: an input is malformed, or the server does not answer or refuses.
    """
    settings, run_id = tracker.settings, tracker.pipeline_run()
    registry = Registry(settings)
    where = _where(inputs)
    tracker.set_tags(run_id, where)
    identity = {
        "merged_digest": folder_digest(inputs.exported / "merged"),
        "registered_form": settings.registered_form,
    }
    version = registry.of_run(run_id, identity)
    if version is not None and version.complete:
        number = version.number
    else:
        trust = MergedModel.read(inputs.exported).trust_remote_code
        tokenizer = load_tokenizer(inputs.exported / "merged", trust)
        keep_signature(tracker, run_id, inputs.exported / "merged")
        digests, example = _keep_for_comparison(tracker, run_id, inputs, tokenizer)
        tags = {
            **identity,
            **where,
            **_tags(tracker, inputs, origin),
            **digests,
            "tokenizer_digest": vocabulary_digest(tokenizer),
            **_metrics(tracker, inputs),
        }
        if version is None:
            model_id = log_model(settings, run_id, inputs.exported, trust, example, identity)
            number = register_model(settings, model_id, tags)
        else:
            number = version.number
            registry.tag(number, tags)
    challenger = registry.by_alias(CHALLENGER)
    if challenger is None or challenger.number < number:
        registry.set_alias(CHALLENGER, number)
    return registry.name, number


def _keep_for_comparison(
    tracker: Tracker, run_id: str, inputs: Inputs, tokenizer: Any
) -> tuple[dict[str, str], str]:
    """Keep the scored rows and the adapter with its rank map in the run; (tags with the rows' digests, a prompt)."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        digests = write_held_out(inputs.rows, folder / HELD_OUT)
        tracker.log_folder(run_id, folder / HELD_OUT, HELD_OUT)
        example = _example(folder / HELD_OUT, tokenizer)
        Evaluation.read(inputs.winner).rounds[-1].rank_map.write(folder / "rank_map")
        tracker.log_folder(run_id, inputs.winner / "adapter", ADAPTER)
        tracker.log_folder(run_id, folder / "rank_map", ADAPTER)
    return digests, example


def _where(inputs: Inputs) -> dict[str, str]:
    """Where the export is, for those who clean up: its artifact, and its folders as they were published."""
    published = MergedModel.read(inputs.exported).published
    where = {EXPORT: inputs.export_uri} if inputs.export_uri else {}
    return where | {f"{PUBLISHED}{folder}": address for folder, address in published.items()}


def _tags(tracker: Tracker, inputs: Inputs, origin: dict[str, str]) -> dict[str, str]:
    evaluation = Evaluation.read(inputs.winner)
    tags = {
        OWN_TAG: tracker.run_key,
        "method": evaluation.method,
        "base_digest": evaluation.base_digest,
        "data_digest": evaluation.data_digest,
        "merged_into": MergedModel.read(inputs.exported).merged_into,
        SIGNED_BY: MergedModel.read(inputs.exported).signed_by,
        "spectraqlora_version": __version__,
        "source_revision": os.environ.get(REVISION, ""),
        **origin,
    }
    return {name: value for name, value in tags.items() if value}


def _metrics(tracker: Tracker, inputs: Inputs) -> dict[str, str]:
    """The winner's numbers as tags, and at last the loss of the form that is registered."""
    merged = MergedModel.read(inputs.exported)
    adapter = tracker.settings.registered_form == "adapter"
    loss = merged.eval_loss_original if adapter else merged.verified_eval_loss
    # The adapter is registered with the original base: the test loss of another merge is not its own.
    tested = merged.test_loss is not None and (not adapter or merged.merged_into == "original")
    test = {TEST_LOSS: merged.test_loss} if tested else {}
    numbers = {**Evaluation.read(inputs.winner).headline(), **test, COMPLETING_TAG: loss}
    return {name: f"{value:.9g}" for name, value in numbers.items()}


def _example(rows: Path, tokenizer: Any) -> str:
    """A prompt as the model was trained on it: of a scored answer, or the start of a row."""
    scored, answers = read_held_out(rows)
    if answers:
        return answers[0]["prompt"]
    return str(tokenizer.decode(scored[0]["input_ids"][:_NEW_TOKENS], skip_special_tokens=True)) or "Hello"


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's vocabulary: where it is equal, losses per token compare."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
