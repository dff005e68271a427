"""The step's work: score base and adapter, measure the updated weights, decide the next round."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectraqlora.artifacts import (
    Evaluation,
    FourBitModel,
    PreparedRows,
    RankMap,
    RoundResult,
    Similarity,
    TrainingLog,
)
from spectraqlora.methods.carry_over import UpdateSpectrum, carry_over, update_spectrum
from spectraqlora.methods.catalogue import method, moving
from spectraqlora.methods.ranks import next_map
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit, load_tokenizer, original_tensors
from spectraqlora.models.modules import dequantized_weight
from spectraqlora.scoring.batches import load_rows
from spectraqlora.scoring.loss import accuracy, score
from spectraqlora.settings import EvaluateSettings, SelectSettings, SnrSettings
from spectraqlora.signals.scores import Scores, calibration_sketches, module_scores
from spectraqlora.snr.scan import scan_tensors, tensors_of
from spectraqlora.snr.table import write_table

if TYPE_CHECKING:
    from spectraqlora.signals.gradients import GradientSketch


def re_evaluate(
    quantized: Path,
    data: Path,
    ranks_folder: Path,
    adapter: Path,
    settings: EvaluateSettings,
    select: SelectSettings,
    snr: SnrSettings,
    seed: int,
    evaluation_out: Path,
    ranks_out: Path,
    adapter_out: Path,
    previous: Path | None = None,
) -> Evaluation:
    """Write the evaluation, the next round's rank map and the adapter carried over to it."""
    ranks, prepared = RankMap.read(ranks_folder), PreparedRows.read(data)
    log = TrainingLog.read(adapter)
    held_out = load_rows(data, "held_out")
    model, manifest = load_four_bit(quantized)
    ranks.check_base(manifest.base_digest)
    before = Evaluation.read(previous) if previous else None
    trained = log.train_tokens > 0
    if previous is not None and before is not None and not trained:
        result = _unchanged_round(before, ranks, log)
        result.write(evaluation_out)
        shutil.copytree(
            previous, evaluation_out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("evaluation.json")
        )
        shutil.copytree(ranks_folder, ranks_out, dirs_exist_ok=True)
        ranks.model_copy(update={"round": ranks.round + 1}).write(ranks_out)
        shutil.copytree(adapter, adapter_out, dirs_exist_ok=True)
        return result

    tokenizer = load_tokenizer(quantized / "model", manifest.trust_remote_code)
    answers = prepared.answers[: settings.accuracy_rows]

    def exact() -> float | None:
        return (
            accuracy(model, tokenizer, answers, settings.max_new_tokens, settings.batch_size)
            if answers
            else None
        )

    print("scoring the base model", flush=True)
    if before:
        base_loss, base_perplexity = before.base_eval_loss, before.base_perplexity
        base_accuracy = before.base_accuracy
    else:
        base = score(model, held_out, settings.batch_size)
        base_loss, base_perplexity, base_accuracy = base.loss, base.perplexity, exact()
    weights = adapters.read_adapter_weights(adapter)
    wrapped = adapters.attach(model, ranks, start=weights)
    wrapped.eval()
    print("scoring the adapter", flush=True)
    tuned = score(wrapped, held_out, settings.batch_size)
    tuned_accuracy = exact()

    print("measuring the updated weights", flush=True)
    spectra, updated = _measure(wrapped, manifest, ranks, weights, settings, snr)
    table = scan_tensors(updated)
    write_table(table, evaluation_out)
    sketches: dict[str, GradientSketch] = {}
    moves = method(ranks.method).moves
    if moves and select.needs_gradients:
        print("measuring the task's gradients again", flush=True)
        sketches = calibration_sketches(wrapped, manifest.modules, data, select, seed)
    scores = module_scores(select, manifest.modules, table, sketches)
    if select.needs_gradients:
        scores = keep_earned(scores, ranks)
    following = (
        moving(ranks.method).next_ranks(ranks, manifest.modules, scores, spectra, select)
        if moves
        else next_map(ranks, ranks.modules, [])
    )
    carried, errors = carry_over(weights, ranks, following, seed)
    changes = [
        f"{line} (relative error {errors[line.split(':')[0]]:.1%})" if line.split(":")[0] in errors else line
        for line in following.changes
    ]
    following = following.model_copy(update={"changes": changes})
    following.write(ranks_out)
    _carry_folder(adapter, adapter_out, carried, wrapped, following, manifest)

    this_round = RoundResult(
        round=ranks.round,
        eval_loss=tuned.loss,
        changes=changes,
        trained=trained,
        training=log,
        rank_map=ranks,
        update_spectrum={
            name: {
                "energy_rank": s.energy_rank,
                "effective_rank": s.effective_rank,
                "relative_norm": s.relative_norm,
            }
            for name, s in spectra.items()
        },
    )
    rounds = [*(before.rounds if before else []), this_round]
    seconds = sum(r.training.train_seconds for r in rounds)
    similarity = ranks_folder / Similarity.filename()
    result = Evaluation(
        method=ranks.method,
        base_digest=manifest.base_digest,
        data_digest=prepared.digest,
        base_eval_loss=base_loss,
        base_perplexity=base_perplexity,
        base_accuracy=base_accuracy,
        eval_loss=tuned.loss,
        eval_loss_stderr=tuned.stderr,
        perplexity=tuned.perplexity,
        accuracy=tuned_accuracy,
        eval_rows=len(tuned.losses),
        row_losses=tuned.losses,
        row_tokens=tuned.tokens,
        settings={
            "select": select.model_dump(mode="json"),
            "evaluate": settings.model_dump(mode="json"),
            "snr": snr.model_dump(mode="json"),
        },
        trainable_parameters=max(r.training.trainable_parameters for r in rounds),
        train_seconds=seconds,
        train_tokens_per_second=sum(r.training.train_tokens for r in rounds) / seconds,
        peak_memory_bytes=max(r.training.peak_memory_bytes for r in rounds),
        rounds=rounds,
        snr_after={row.module: float(row.snr) for row in table.itertuples() if math.isfinite(row.snr)},
        similarity=Similarity.read(ranks_folder)
        if similarity.exists()
        else (before.similarity if before else None),
    )
    result.write(evaluation_out)
    print(
        f"{ranks.method} round {ranks.round}: eval loss {base_loss:.4f} to {tuned.loss:.4f}; {len(changes)} notes"
    )
    return result


def keep_earned(scores: Scores, ranks: RankMap) -> Scores:
    """Task scores in which no module falls below what it was chosen for.

    Training uses a module's gradient up; what is left of it says nothing against the module.
    """
    earned = {m.module: m.score for m in ranks.modules if m.score is not None}
    return {name: (max(score, earned.get(name, score)), second) for name, (score, second) in scores.items()}


def _unchanged_round(before: Evaluation, ranks: RankMap, log: TrainingLog) -> Evaluation:
    note = ["nothing moved: the method keeps its rank map; its whole budget was spent in round 1"]
    result = RoundResult(
        round=ranks.round,
        eval_loss=before.eval_loss,
        changes=note,
        trained=False,
        training=log,
        rank_map=ranks,
        update_spectrum={},
    )
    return before.model_copy(update={"rounds": [*before.rounds, result]})


def _measure(
    wrapped: Any,
    manifest: FourBitModel,
    ranks: RankMap,
    weights: dict[str, torch.Tensor],
    settings: EvaluateSettings,
    snr: SnrSettings,
) -> tuple[dict[str, UpdateSpectrum], Iterator[tuple[str, torch.Tensor]]]:
    """Spectra of all updates, and a stream of updated weights from the source that snr-analyze used."""
    entries = {m.module: m for m in ranks.active()}
    layers: dict[str, Any] = dict(wrapped.base_model.model.named_modules())
    spectra: dict[str, UpdateSpectrum] = {}

    def plain() -> Iterator[tuple[str, torch.Tensor]]:
        if snr.source == "original":
            yield from tensors_of(original_tensors(manifest), manifest.modules)
            return
        for info in manifest.modules:
            layer = layers[info.module]
            yield info.module, dequantized_weight(getattr(layer, "base_layer", layer)).cpu()

    def updated() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in plain():
            if name in entries:
                weight = adapters.merged_weight(entries[name], ranks, weights, weight)
            yield name, weight

    for name, entry in entries.items():
        layer = layers[name]
        norm = float(dequantized_weight(getattr(layer, "base_layer", layer)).norm())
        spectra[name] = update_spectrum(
            weights[f"{name}.lora_A"],
            weights[f"{name}.lora_B"],
            ranks.scaling(entry),
            norm,
            settings.update_energy,
        )
    return spectra, updated()


def _carry_folder(
    adapter: Path,
    output: Path,
    carried: dict[str, torch.Tensor],
    wrapped: Any,
    following: RankMap,
    manifest: FourBitModel,
) -> None:
    """Write the carried-over adapter as a standard PEFT adapter beside its training log."""
    if following.changes == ["nothing moved"]:
        shutil.copytree(adapter, output, dirs_exist_ok=True)
        return
    base = wrapped.unload()
    adapters.save(adapters.attach(base, following, start=carried), output, manifest.source)
    TrainingLog.read(adapter).write(output)
