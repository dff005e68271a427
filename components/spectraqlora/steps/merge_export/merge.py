"""Merge the winner's adapter, measure where it merges best, export and verify."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from spectraqlora.artifacts import Evaluation, FourBitModel, MergedModel
from spectraqlora.files import write_text
from spectraqlora.models import adapters
from spectraqlora.models.four_bit import copy_dequantized
from spectraqlora.models.loading import load_four_bit, load_plain, load_tokenizer, original_folder
from spectraqlora.places import kind_of
from spectraqlora.scoring.batches import load_rows
from spectraqlora.scoring.loss import score
from spectraqlora.settings import EvaluateSettings, ExportSettings
from spectraqlora.storage import parse_address, upload_folder

FOLDERS = ("merged", "adapter")


def merge_export(
    quantized: Path,
    data: Path,
    adapter: Path,
    evaluation: Evaluation,
    settings: EvaluateSettings,
    output: Path,
    export: ExportSettings | None = None,
) -> MergedModel:
    """Write `merged/`, `adapter/` and the manifest; the better of both merges is exported, and published.

    The adapter was trained against the dequantized 4-bit weights; the original weights are the better
    base but shift under it. Both are scored on the eval split, then the exported folder is loaded again
    and scored as proof.
    """
    held_out = load_rows(data, "held_out")
    manifest = FourBitModel.read(quantized)
    dtype, trust = getattr(torch, manifest.compute_dtype), manifest.trust_remote_code

    def merged(into: str) -> Any:
        plain = load_plain(original_folder(manifest), dtype, trust)
        if into == "quantized":
            transposed = {m.module for m in manifest.modules if m.transposed}
            copy_dequantized(load_four_bit(quantized)[0], plain, transposed)
        return adapters.merge(plain, adapter)

    losses: dict[str, float] = {}
    best: Any = None
    for into in ("quantized", "original"):
        best = None  # One whole model at a time.
        print(f"merging into the {into} weights", flush=True)
        best = merged(into)
        losses[into] = score(best, held_out, settings.batch_size).loss
    into = "original" if losses["original"] <= losses["quantized"] else "quantized"
    if into == "quantized":
        best = None
        best = merged(into)
    best.save_pretrained(output / "merged", safe_serialization=True)
    load_tokenizer(quantized / "model", trust).save_pretrained(output / "merged")
    best = None

    shutil.copytree(
        adapter, output / "adapter", dirs_exist_ok=True, ignore=shutil.ignore_patterns("training.json")
    )
    reloaded = load_plain(output / "merged", dtype, trust)
    verified = score(reloaded, held_out, settings.batch_size).loss
    expected = losses[into]
    if abs(verified - expected) > 1e-2 * max(expected, 1e-3) + 1e-3:
        raise RuntimeError(
            f"the exported model scores {verified:.4f} where {expected:.4f} was measured before"
        )
    result = MergedModel(
        method=evaluation.method,
        base_digest=manifest.base_digest,
        trust_remote_code=trust,
        merged_into=into,
        adapter_eval_loss=evaluation.eval_loss,
        eval_loss_quantized=losses["quantized"],
        eval_loss_original=losses["original"],
        verified_eval_loss=verified,
    )
    card = model_card(result, evaluation, manifest)
    for name in FOLDERS:
        write_text(output / name / "README.md", card)
    if export and export.destination:
        address = parse_address(export.destination, "export.destination")
        result.published = {name: upload_folder(output / name, address.child(name)) for name in FOLDERS}
    result.write(output)
    return result


def model_card(result: MergedModel, evaluation: Evaluation, manifest: FourBitModel) -> str:
    """The card beside the exported model and adapter, with both merges' numbers."""
    accuracy = "not scored" if evaluation.accuracy is None else f"{evaluation.accuracy:.1%}"
    base_accuracy = "not scored" if evaluation.base_accuracy is None else f"{evaluation.base_accuracy:.1%}"
    # Where paths and buckets are is nobody's business but their owner's.
    private = kind_of(manifest.source) in ("path", "s3")
    source = Path(manifest.source).name if private else manifest.source
    return f"""---
library_name: transformers
tags: [qlora, spectrum, spectraqlora]
---
# {source}, fine-tuned with {result.method}

Trained by SpectraQLoRA: a 4-bit NF4 frozen base with LoRA adapters ({result.method}), merged into the
{result.merged_into} weights. Loads with transformers alone; the adapter loads with peft alone.

| on {evaluation.eval_rows} held-out rows | base (4-bit) | adapter on 4-bit | merged, dequantized | merged, original |
| --- | --- | --- | --- | --- |
| eval loss (nats per token) | {evaluation.base_eval_loss:.4f} | {evaluation.eval_loss:.4f} | \
{result.eval_loss_quantized:.4f} | {result.eval_loss_original:.4f} |
| exact-match accuracy | {base_accuracy} | {accuracy} | | |

- Exported: merged into the {result.merged_into} weights, verified eval loss {result.verified_eval_loss:.4f}.
- Trainable parameters: {evaluation.trainable_parameters:,}.
- Base digest: {manifest.base_digest}. Data digest: {evaluation.data_digest}.
"""
