"""Merge the winner's adapter, measure where it merges best, export and verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectraqlora.artifacts import Evaluation, FourBitModel, MergedModel, PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import apply_umask, write_text
from spectraqlora.models import adapters
from spectraqlora.models.four_bit import copy_dequantized
from spectraqlora.models.loading import (
    load_four_bit,
    load_plain,
    load_tokenizer,
    original_folder,
    stored_bytes,
)
from spectraqlora.places import kind_of
from spectraqlora.runtime.console import say, warn
from spectraqlora.runtime.disk import ask
from spectraqlora.runtime.step import MADE_FROM
from spectraqlora.scoring.batches import load_rows
from spectraqlora.scoring.held_out import score_test_rows
from spectraqlora.scoring.loss import score
from spectraqlora.settings import EvaluateSettings, ExportSettings
from spectraqlora.signing import SHARD_SIZE, SIGNATURE, check_signing, fingerprint, sign
from spectraqlora.steps.merge_export.bom import BOM, bill_of_materials
from spectraqlora.steps.merge_export.turn_end import end_turns
from spectraqlora.storage import parse_address, upload_folder

FOLDERS = ("merged", "adapter")


@dataclass(frozen=True)
class Inputs:
    """The folders that the step reads; the winner's holds its `adapter/` and its evaluation."""

    four_bit: Path
    rows: Path
    winner: Path

    @property
    def adapter(self) -> Path:
        """The winner's adapter."""
        return self.winner / "adapter"


def merge_export(
    inputs: Inputs, evaluate: EvaluateSettings, output: Path, export: ExportSettings = ExportSettings()
) -> MergedModel:
    """Write `merged/`, `adapter/` and the manifest; the better of both merges is exported, and published.

    The adapter was trained against the dequantized 4-bit weights; the original weights are the better
    base but shift under it. Both are scored on the held-out rows, then the exported folder is loaded again
    and scored as proof. Only what is exported is scored on the test rows, once: they choose nothing.

    Args:
        inputs: what is read.
        evaluate: rows per forward pass.
        output: the exported model's folder.
        export: where `merged/` and `adapter/` are published as well.

    Raises:
        InputError: an input is malformed, the original model is not there any more, or a key cannot be used.
        RuntimeError: the exported model scores otherwise than the merged one did.
    """
    key = check_signing(export)
    manifest, evaluation = FourBitModel.read(inputs.four_bit), Evaluation.read(inputs.winner)
    held_out = load_rows(inputs.rows, "held_out")
    packing = PreparedRows.read(inputs.rows).shared_sequences

    def loss(model: Any) -> float:
        return score(model, held_out, evaluate.batch_size, packing=packing).loss

    losses, into = _write_better_merge(inputs, manifest, loss, output)
    leave_out = shutil.ignore_patterns("training.json", MADE_FROM)
    shutil.copytree(inputs.adapter, output / "adapter", dirs_exist_ok=True, ignore=leave_out)
    adapters.settle_scaling(output / "adapter")
    for name in FOLDERS:
        apply_umask(output / name)
    exported = load_plain(
        output / "merged", getattr(torch, manifest.compute_dtype), manifest.trust_remote_code
    )
    warning = merge_warning(evaluation, losses[into])
    if warning:
        warn(warning)
    result = MergedModel(
        method=evaluation.method,
        base_digest=manifest.base_digest,
        trust_remote_code=manifest.trust_remote_code,
        merged_into=into,
        adapter_eval_loss=evaluation.eval_loss,
        eval_loss_quantized=losses["quantized"],
        eval_loss_original=losses["original"],
        verified_eval_loss=_verified(exported, loss, losses[into]),
        dtype=_exported_dtype(manifest),
        warning=warning,
        signed_by=fingerprint(key) if key else "",
    )
    test = score_test_rows(exported, inputs.rows, evaluate.batch_size)
    if test:
        result.test_rows, result.test_loss, result.test_loss_stderr = len(test.losses), test.loss, test.stderr
        result.base_test_loss = evaluation.base_test_loss
        say(f"test loss of the {len(test.losses)} rows that chose nothing: {test.loss:.4f}")
    card = model_card(result, evaluation, manifest)
    bill = bill_of_materials(result, evaluation, manifest, PreparedRows.read(inputs.rows), output / "merged")
    for name in FOLDERS:
        write_text(output / name / "README.md", card)
    write_text(output / "merged" / BOM, json.dumps(bill, indent=1))
    for name in FOLDERS if key else ():
        sign(output / name, key)
    if export.destination:
        address = parse_address(export.destination, "export.destination")
        result.published = {name: upload_folder(output / name, address.child(name)) for name in FOLDERS}
    result.write(output)
    return result


def merge_warning(evaluation: Evaluation, merged_loss: float) -> str:
    """A sentence where the merge lost more than chance explains of what was trained; empty where it did not.

    Args:
        evaluation: of the adapter on the 4-bit base.
        merged_loss: of the better merge on the same held-out rows.
    """
    lost = merged_loss - evaluation.eval_loss
    if not lost > evaluation.eval_loss_stderr:
        return ""
    return (
        f"the merged model's eval loss, {merged_loss:.4f}, is worse than the adapter's, {evaluation.eval_loss:.4f}, by "
        f"more than its standard error, {evaluation.eval_loss_stderr:.4f}: use the adapter on the 4-bit base "
        "(tracking.registered_form=adapter registers it), train longer, or with a higher select.rank"
    )


def make_savable(model: Any) -> None:
    """Settle a generation config that contradicts itself, as published ones do: changed, it is not saved otherwise.

    A temperature or the like without sampling means sampling; where that is not it, the token ids alone are kept.
    """
    from transformers import GenerationConfig

    config = model.generation_config
    for sampling in (config.do_sample, True) if config is not None else ():
        config.do_sample = sampling
        try:
            config.validate(strict=True)
            return
        except ValueError:
            continue
    if config is not None:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(
            **ids, decoder_start_token_id=config.decoder_start_token_id
        )
        warn("the base's generation config contradicts itself: the export's names its special tokens alone")


def _test_line(result: MergedModel) -> str:
    """The card's line on the rows that chose neither checkpoint nor method nor merge."""
    if result.test_loss is None:
        return "- No test rows: the held-out rows above chose checkpoint, method and merge.\n"
    base = "" if result.base_test_loss is None else f"; the base's (4-bit) {result.base_test_loss:.4f}"
    return (
        f"- Test loss on {result.test_rows} rows that chose nothing: {result.test_loss:.4f} ± "
        f"{result.test_loss_stderr:.4f}{base}.\n"
    )


def _exported_dtype(manifest: FourBitModel) -> str:
    """The base's own type; of a base whose type is not known, the one that was computed in."""
    return manifest.dtype or manifest.compute_dtype


def _parameters_to_round(model: Any, dtype: torch.dtype) -> Iterator[torch.nn.Parameter]:
    """The parameters that are exported in the base's type: all but those that the model keeps in float32."""
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, parameter in model.named_parameters():
        if (
            parameter.is_floating_point()
            and parameter.dtype != dtype
            and not any(part in name for part in kept)
        ):
            yield parameter


def _merged(into: str, inputs: Inputs, manifest: FourBitModel) -> Any:
    """The base with the adapter merged into its `quantized` or `original` weights.

    Its numbers are rounded to the type that they are exported in: what is scored is what is written.

    Raises:
        InputError: a number is beyond what that type holds.
    """
    dtype, trust = getattr(torch, manifest.compute_dtype), manifest.trust_remote_code
    plain = load_plain(original_folder(manifest), dtype, trust)
    if into == "quantized":
        transposed = {m.module for m in manifest.modules if m.transposed}
        copy_dequantized(load_four_bit(inputs.four_bit)[0], plain, transposed)
    merged = adapters.merge(plain, inputs.adapter)
    exported = getattr(torch, _exported_dtype(manifest))
    for parameter in _parameters_to_round(merged, exported):
        parameter.data.copy_(parameter.data.to(exported))
        if not torch.isfinite(torch.stack(torch.aminmax(parameter.data))).all():
            raise InputError(
                "merged weights", _exported_dtype(manifest), "numbers that the base's type holds"
            )
    return merged


def _write_better_merge(
    inputs: Inputs, manifest: FourBitModel, loss: Callable[[Any], float], output: Path
) -> tuple[dict[str, float], str]:
    """Score both merges and write the better one to `merged/`; losses by the weights merged into, and which."""
    losses: dict[str, float] = {}
    model: Any = None
    for into in ("quantized", "original"):
        model = None  # One unquantized model at a time.
        say(f"merging into the {into} weights")
        model = _merged(into, inputs, manifest)
        losses[into] = loss(model)
    better = "original" if losses["original"] <= losses["quantized"] else "quantized"
    if better == "quantized":
        model = None
        model = _merged(better, inputs, manifest)
    exported = getattr(torch, _exported_dtype(manifest))
    for parameter in _parameters_to_round(model, exported):
        parameter.data = parameter.data.to(exported)
    model.config.dtype = exported
    tokenizer = load_tokenizer(inputs.four_bit / "model", manifest.trust_remote_code)
    end_turns(model, tokenizer, PreparedRows.read(inputs.rows))
    make_savable(model)
    ask(output, stored_bytes(model), "the merged model")
    model.save_pretrained(output / "merged", safe_serialization=True, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(output / "merged")
    return losses, better


def _verified(exported: Any, loss: Callable[[Any], float], expected: float) -> float:
    """Loss of the exported model, loaded again."""
    verified = loss(exported)
    if abs(verified - expected) > 1e-2 * max(expected, 1e-3) + 1e-3:
        raise RuntimeError(
            f"the exported model scores {verified:.4f} where {expected:.4f} was measured before"
        )
    return verified


def _signature(result: MergedModel) -> str:
    if not result.signed_by:
        return "unsigned (export.signature: optional)"
    return f"`{SIGNATURE}` (OpenSSF model signing), of the key with SHA-256 {result.signed_by}"


def model_card(result: MergedModel, evaluation: Evaluation, manifest: FourBitModel) -> str:
    """The card next to the exported model and adapter, with both merges' numbers."""
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
{_test_line(result)}\
{f"- Warning: {result.warning}.{chr(10)}" if result.warning else ""}\
- Trainable parameters: {evaluation.trainable_parameters:,}.
- Signature: {_signature(result)}.
- Base digest: {manifest.base_digest}. Data digest: {evaluation.data_digest}.
"""
