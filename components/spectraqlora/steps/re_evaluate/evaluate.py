"""The step's work: score the adapter, measure the weights that it updated, and prepare the round that follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spectraqlora.artifacts import (
    BaseMeasurement,
    Evaluation,
    FourBitModel,
    PreparedRows,
    RankMap,
    RoundResult,
    TrainingLog,
    write_nothing,
)
from spectraqlora.errors import InputError
from spectraqlora.methods.carry_over import UpdateSpectrum
from spectraqlora.methods.catalogue import method
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit, load_tokenizer
from spectraqlora.runtime.console import say
from spectraqlora.scoring.batches import load_rows
from spectraqlora.scoring.loss import Score, accuracy, score
from spectraqlora.settings import EvaluateSettings, SelectSettings, SnrSettings
from spectraqlora.snr.table import finite_snr, read_table, write_table
from spectraqlora.steps.re_evaluate.following_round import write_following_round
from spectraqlora.steps.re_evaluate.updated_weights import update_spectra, updated_table


@dataclass(frozen=True)
class Inputs:
    """The folders that the step reads; `previous` is the evaluation of the round before."""

    four_bit: Path
    rows: Path
    rank_map: Path
    adapter: Path
    table: Path
    measurement: Path
    previous: Path | None = None


@dataclass(frozen=True)
class Outputs:
    """The folders that the step writes; the last two hold the round that follows, where one does."""

    evaluation: Path
    next_rank_map: Path
    next_adapter: Path


@dataclass(frozen=True)
class Sections:
    """The sections of settings that the step goes by."""

    evaluate: EvaluateSettings
    select: SelectSettings
    snr: SnrSettings


@dataclass(frozen=True)
class Trained:
    """What training left, with the manifests of what it was trained on."""

    rank_map: RankMap
    log: TrainingLog
    weights: dict[str, torch.Tensor]
    manifest: FourBitModel
    rows: PreparedRows
    base: BaseMeasurement
    before: Evaluation | None


def re_evaluate(
    inputs: Inputs, outputs: Outputs, sections: Sections, round: int, rounds: int, seed: int
) -> Evaluation:
    """Write the branch's evaluation and, unless this was its last round, the next rank map and adapter.

    Args:
        inputs: what is read.
        outputs: what is written.
        sections: the settings.
        round: this round, from 1.
        rounds: how many rounds the branch has; those of a method whose rank map never moves are one.
        seed: of the calibration rows, and of fresh rows in grown adapters.

    Raises:
        InputError: an input is malformed, or made from another base model, other rows or in another round.
    """
    model, manifest = load_four_bit(inputs.four_bit)
    trained = _read(inputs, manifest, round)
    rank_map = trained.rank_map
    wrapped = adapters.attach(model, rank_map, start=trained.weights)
    wrapped.eval()
    held_out = load_rows(inputs.rows, "held_out")
    say(f"scoring the adapter on {len(held_out)} held-out rows")
    result = score(wrapped, held_out, sections.evaluate.batch_size, packing=trained.rows.shared_sequences)
    exact = _accuracy(model, trained, inputs, sections.evaluate)
    follows = method(rank_map.method).moves and round < rounds

    active = len(rank_map.active())
    say(f"measuring the {active} updated weight matrices of {len(manifest.modules)}")
    spectra = update_spectra(wrapped, rank_map, trained.weights, sections.evaluate.update_energy)
    table = updated_table(
        read_table(inputs.table), wrapped, manifest, rank_map, trained.weights, sections.snr
    )
    write_table(table, outputs.evaluation)

    changes: list[str] = []
    if follows:
        changes = write_following_round(
            wrapped, trained, inputs, outputs, sections.select, table, spectra, seed
        )
    else:
        for folder in (outputs.next_rank_map, outputs.next_adapter):
            write_nothing(folder, f"no round follows round {round} of {rank_map.method}")
    evaluation = _evaluation(trained, sections, result, exact, finite_snr(table), spectra, changes)
    evaluation.write(outputs.evaluation)
    say(f"{rank_map.method} round {rank_map.round}: eval loss {trained.base.loss:.4f} to {result.loss:.4f}")
    return evaluation


def _read(inputs: Inputs, manifest: FourBitModel, round: int) -> Trained:
    rank_map, rows = RankMap.read(inputs.rank_map), PreparedRows.read(inputs.rows)
    rank_map.check_base(manifest.base_digest)
    if rank_map.round != round:
        raise InputError("round", round, f"{rank_map.round}, that of the rank map")
    base = BaseMeasurement.read(inputs.measurement)
    base.check_origin(manifest.base_digest, rows.digest)
    return Trained(
        rank_map=rank_map,
        log=TrainingLog.read(inputs.adapter),
        weights=adapters.read_adapter_weights(inputs.adapter),
        manifest=manifest,
        rows=rows,
        base=base,
        before=Evaluation.read(inputs.previous) if inputs.previous else None,
    )


def _accuracy(model: Any, trained: Trained, inputs: Inputs, evaluate: EvaluateSettings) -> float | None:
    answers = trained.rows.answers[: evaluate.accuracy_rows]
    tokenizer = load_tokenizer(inputs.four_bit / "model", trained.manifest.trust_remote_code)
    return accuracy(
        model, tokenizer, answers, evaluate.max_new_tokens, evaluate.batch_size, trained.rows.turn_ends
    )


def _evaluation(
    trained: Trained,
    sections: Sections,
    result: Score,
    exact: float | None,
    snr_after: dict[str, float],
    spectra: dict[str, UpdateSpectrum],
    changes: list[str],
) -> Evaluation:
    """The branch's evaluation after this round, with the rounds before it."""
    rank_map, base, before = trained.rank_map, trained.base, trained.before
    this_round = RoundResult(
        round=rank_map.round,
        eval_loss=result.loss,
        changes=changes,
        training=trained.log,
        rank_map=rank_map,
        update_spectrum={name: asdict(spectrum) for name, spectrum in spectra.items()},
    )
    rounds = [*(before.rounds if before else []), this_round]
    seconds = sum(r.training.train_seconds for r in rounds)
    return Evaluation(
        method=rank_map.method,
        base_digest=trained.manifest.base_digest,
        data_digest=trained.rows.digest,
        base_eval_loss=base.loss,
        base_perplexity=base.perplexity,
        base_accuracy=base.accuracy,
        base_test_loss=base.test_loss,
        eval_loss=result.loss,
        eval_loss_stderr=result.stderr,
        perplexity=result.perplexity,
        accuracy=exact,
        eval_rows=len(result.losses),
        row_losses=result.losses,
        row_tokens=result.tokens,
        settings={
            name: section.model_dump(mode="json")
            for name, section in (
                ("select", sections.select),
                ("evaluate", sections.evaluate),
                ("snr", sections.snr),
            )
        },
        trainable_parameters=max(r.training.trainable_parameters for r in rounds),
        train_seconds=seconds,
        train_tokens_per_second=sum(r.training.train_tokens for r in rounds) / seconds,
        peak_memory_bytes=max(r.training.peak_memory_bytes for r in rounds),
        rounds=rounds,
        snr_after=snr_after,
        similarity=rank_map.similarity or (before.similarity if before else None),
    )
