"""4-bit NF4 with double quantization (QLoRA, arXiv 2305.14314) through bitsandbytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from spectraqlora.artifacts import FourBitModel, ModelOutline
from spectraqlora.files import folder_digest
from spectraqlora.models.families import check_computes
from spectraqlora.models.four_bit import count_parameters, load_in_four_bit, unquantized
from spectraqlora.models.hardware import compute_dtype
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.models.modules import candidates
from spectraqlora.models.tensors import check_model_folder
from spectraqlora.places import resolve_base
from spectraqlora.settings import ModelSettings, is_address
from spectraqlora.storage import content_digest, parse_address

LOW_SHARE = 0.8


def quantize(settings: ModelSettings, output: Path, outline: Path, content: str = "") -> FourBitModel:
    """Write the 4-bit model (safetensors, tokenizer) and its outline; returns the 4-bit model's manifest.

    Args:
        settings: the `model` section.
        output: folder of the 4-bit model.
        outline: folder of its outline.
        content: what an s3:// address must hold, as `storage.content_digest` says it; empty takes what is there.

    Raises:
        InputError: the model folder is unreadable, holds pickles only, or needs remote code; the model does
            not compute in 4 bits, looks ahead, or has nothing to adapt.
    """
    import torch

    remote = is_address(settings.base_model)
    if remote and not content:
        content = content_digest(parse_address(settings.base_model, "model.base_model"))
    trust = settings.trust_remote_code
    source = resolve_base(settings.base_model, settings.revision, content, trust)
    check_model_folder(source, trust)
    dtype = compute_dtype(settings.compute_dtype)
    model = load_in_four_bit(source, dtype, trust)
    check_computes(model, settings.base_model)
    modules = candidates(model, settings.base_model)
    model.save_pretrained(output / "model", safe_serialization=True)
    load_tokenizer(source, trust).save_pretrained(output / "model")

    total, four_bit = count_parameters(model)
    manifest = FourBitModel(
        source=settings.base_model,
        revision=settings.revision,
        source_path=str(source.resolve()),
        source_content=content if remote else "",
        trust_remote_code=trust,
        base_digest=folder_digest(source),
        compute_dtype=str(dtype).removeprefix("torch."),
        parameters=total,
        four_bit_parameters=four_bit,
        unquantized=unquantized(model),
        modules=modules,
    )
    manifest.write(output)
    _write_outline(manifest, output, outline)
    share = four_bit / total
    print(json.dumps({"parameters": total, "four_bit_share": round(share, 4), "compute_dtype": str(dtype)}))
    if share < LOW_SHARE:
        linear = sum(m.out_features * m.in_features for m in modules)
        print(
            f"WARNING: only {share:.0%} of the parameters are 4-bit (expected at least {LOW_SHARE:.0%}); "
            f"{four_bit / max(linear, 1):.0%} of the decoder's linear weights are, the rest is embeddings, "
            "norms or layers that bitsandbytes does not know"
        )
    experts = sum(len(p) for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name)
    if experts:
        print(
            f"{experts} expert matrices in fused tensors stay in {manifest.compute_dtype} and frozen: bitsandbytes "
            "packs, and the rank map adapts, layers; their SNR is measured"
        )
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return manifest


def _write_outline(manifest: FourBitModel, four_bit: Path, outline: Path) -> None:
    """Copy all that is not weights: configs, tokenizer, and the model's own code where it has some."""
    shutil.copytree(
        four_bit / "model",
        outline / "model",
        ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"),
    )
    ModelOutline(**manifest.model_dump(include=set(ModelOutline.model_fields))).write(outline)
