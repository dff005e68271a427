"""4-bit NF4 with double quantization (QLoRA, arXiv 2305.14314) through bitsandbytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import FourBitModel, ModelOutline
from spectraqlora.errors import InputError
from spectraqlora.models.experts import is_fused, packed_experts
from spectraqlora.models.families import check_computes, settle_tie
from spectraqlora.models.finite import check_finite
from spectraqlora.models.four_bit import count_parameters, load_in_four_bit, own_four_bit, unquantized
from spectraqlora.models.hardware import compute_dtype
from spectraqlora.models.inspection import Inspection, inspect_folder
from spectraqlora.models.loading import load_tokenizer, stored_bytes
from spectraqlora.models.modules import candidates, linear_modules
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.places import base_digest, base_place
from spectraqlora.runtime.console import say, warn
from spectraqlora.runtime.disk import ask
from spectraqlora.settings import ModelSettings

LOW_SHARE = 0.8


def quantize(settings: ModelSettings, output: Path, outline: Path, content: str = "") -> FourBitModel:
    """Write the 4-bit model (safetensors, tokenizer) and its outline; returns the 4-bit model's manifest.

    Args:
        settings: the `model` section.
        output: folder of the 4-bit model.
        outline: folder of its outline.
        content: what the base model must be, as `Place.digest` says it; empty takes what is there.

    Raises:
        InputError: the base model is another one, or no base for training (models/README.md); it has numbers that are
            not finite, does not compute in 4 bits, or looks ahead.
    """
    import torch

    base = _fetch(settings, content)
    manifest = _write_four_bit(settings, base, output)
    _write_outline(manifest, output, outline)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return manifest


@dataclass(frozen=True)
class _Base:
    """A base model on this machine: what its manifest says of where it is from, and its folder."""

    source: str
    revision: str
    content: str
    digest: str
    folder: Path
    inspection: Inspection


def _fetch(settings: ModelSettings, content: str) -> _Base:
    """The base model's folder, of the content asked for; a hub id is pinned to its commit from now on."""
    place = base_place(settings.base_model, settings.revision, settings.trust_remote_code)
    if place.kind == "s3" and not content:
        content = place.digest()
    folder = place.local_copy(content)
    inspection = inspect_folder(folder, settings.trust_remote_code, place)
    for line in inspection.lines:
        say(f"{place}: {line}")
    digest = base_digest(folder, settings.trust_remote_code)
    if place.kind == "path" and content not in ("", digest):
        raise InputError(place.field, place, "the content that this run began with; it was replaced since")
    check_finite(LocalTensors(folder), place)
    return _Base(
        source=place.text,
        # The hub's client names the folder of a copy after its commit.
        revision=folder.name if place.kind == "hub" else settings.revision,
        content=content if place.kind == "s3" else "",
        digest=digest,
        folder=folder,
        inspection=inspection,
    )


def _write_four_bit(settings: ModelSettings, base: _Base, output: Path) -> FourBitModel:
    """Quantize, save and describe; the model is freed on return."""
    trust = settings.trust_remote_code
    dtype = compute_dtype(settings.compute_dtype)
    model = load_in_four_bit(base.folder, dtype, trust)
    check_computes(model, base.source)
    if settle_tie(model):
        say(
            f"{base.source}: config.json ties head and embeddings, but both are stored, and differ: they stay two"
        )
    stored = {info.module: info.tensor for info in base.inspection.modules}
    modules = [
        info.model_copy(update={"tensor": stored.get(info.module, "")})
        for info in candidates(model, base.source)
    ]
    ask(output, stored_bytes(model), "the 4-bit model")
    model.save_pretrained(output / "model", safe_serialization=True)
    load_tokenizer(base.folder, trust).save_pretrained(output / "model")
    total, four_bit = count_parameters(model)
    own = own_four_bit(base.folder)
    manifest = FourBitModel(
        quant_type=str(own.get("bnb_4bit_quant_type", "fp4" if own else "nf4")),
        double_quant=bool(own.get("bnb_4bit_use_double_quant", not own)),
        dtype=base.inspection.dtype,
        source=base.source,
        revision=base.revision,
        source_path=str(base.folder.resolve()),
        source_content=base.content,
        trust_remote_code=trust,
        base_digest=base.digest,
        compute_dtype=str(dtype).removeprefix("torch."),
        parameters=total,
        four_bit_parameters=four_bit,
        unquantized=unquantized(model),
        modules=modules,
    )
    manifest.write(output)
    _say_what_is_four_bit(manifest, model)
    return manifest


def _say_what_is_four_bit(manifest: FourBitModel, model: Any) -> None:
    """The share of 4-bit parameters, a warning where it is low, and what becomes of fused experts."""
    share = manifest.four_bit_parameters / manifest.parameters
    shown = {
        "parameters": manifest.parameters,
        "four_bit_share": round(share, 4),
        "compute_dtype": f"torch.{manifest.compute_dtype}",
    }
    say(json.dumps(shown))
    if share < LOW_SHARE:
        sizes = [(m.out_features * m.in_features, m.four_bit) for m in linear_modules(model)]
        packed, linear = sum(size for size, four_bit in sizes if four_bit), sum(size for size, _ in sizes)
        warn(
            f"only {share:.0%} of the parameters are 4-bit (expected at least {LOW_SHARE:.0%}); "
            f"{packed / max(linear, 1):.0%} of the decoder's linear weights are, the rest is "
            "embeddings, norms or layers that bitsandbytes does not know"
        )
    if packed := sum(len(tensor) for _, tensor in packed_experts(model)):
        say(
            f"{packed} expert matrices in fused tensors are 4-bit and frozen: the rank map adapts layers; their SNR is "
            "measured"
        )
    plain = sum(len(p) for name, p in model.named_parameters() if is_fused(name, p.shape))
    if plain:
        say(
            f"{plain} expert matrices in fused tensors stay in {manifest.compute_dtype} and frozen: the base's own 4-bit "
            "form has them so, or their numbers do not fill blocks of 64"
        )


def _write_outline(manifest: FourBitModel, four_bit: Path, outline: Path) -> None:
    """Copy all that is not weights: configs, tokenizer, and the model's own code where it has some."""
    shutil.copytree(
        four_bit / "model",
        outline / "model",
        ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"),
    )
    ModelOutline(**manifest.model_dump(include=set(ModelOutline.model_fields))).write(outline)
