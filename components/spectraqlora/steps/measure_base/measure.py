"""The step's work: load the base once, score its held-out rows, sketch its gradients where a method needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectraqlora.artifacts import BaseMeasurement, FourBitModel, PreparedRows
from spectraqlora.methods.catalogue import method
from spectraqlora.models.loading import load_four_bit, load_tokenizer
from spectraqlora.runtime.console import say
from spectraqlora.scoring.batches import load_rows
from spectraqlora.scoring.held_out import score_test_rows
from spectraqlora.scoring.loss import accuracy, score
from spectraqlora.settings import EvaluateSettings, SelectSettings
from spectraqlora.signals.gradients import write_sketches
from spectraqlora.signals.scores import calibration_sketches


@dataclass(frozen=True)
class Inputs:
    """The folders that the step reads."""

    four_bit: Path
    rows: Path


def measure_base(
    inputs: Inputs,
    methods: Sequence[str],
    select: SelectSettings,
    evaluate: EvaluateSettings,
    seed: int,
    output: Path,
) -> BaseMeasurement:
    """Write the base's measurement, and next to it the sketches of all modules where one of `methods` needs them.

    Args:
        inputs: what is read.
        methods: names of all branches.
        select: says which methods need gradients, and from how many batches of how many rows.
        evaluate: rows per pass, and how many answers are scored.
        seed: of the calibration rows and the sketches' projections.
        output: the measurement's folder.

    Raises:
        InputError: there is no such method, or an input is malformed.
    """
    sketching = [name for name in methods if method(name).measures_gradients(select)]
    model, manifest = load_four_bit(inputs.four_bit)
    measurement = _score(model, manifest, inputs, evaluate, sketched=bool(sketching))
    if sketching:
        say(f"measuring the base model's gradients, once for {', '.join(sketching)}")
        torch.manual_seed(seed)
        write_sketches(calibration_sketches(model, manifest.modules, inputs.rows, select, seed), output)
    # Last, so that a measurement that is there is complete.
    measurement.write(output)
    return measurement


def _score(
    model: Any, manifest: FourBitModel, inputs: Inputs, evaluate: EvaluateSettings, sketched: bool
) -> BaseMeasurement:
    held_out, prepared = load_rows(inputs.rows, "held_out"), PreparedRows.read(inputs.rows)
    say(f"scoring the base model on {len(held_out)} held-out rows, once for all branches")
    result = score(model, held_out, evaluate.batch_size, packing=prepared.shared_sequences)
    test = score_test_rows(model, inputs.rows, evaluate.batch_size)
    tokenizer = load_tokenizer(inputs.four_bit / "model", manifest.trust_remote_code)
    answers = prepared.answers[: evaluate.accuracy_rows]
    return BaseMeasurement(
        base_digest=manifest.base_digest,
        rows_digest=prepared.digest,
        loss=result.loss,
        perplexity=result.perplexity,
        accuracy=accuracy(
            model, tokenizer, answers, evaluate.max_new_tokens, evaluate.batch_size, prepared.turn_ends
        ),
        row_losses=result.losses,
        row_tokens=result.tokens,
        sketched=sketched,
        test_loss=test.loss if test else None,
    )
