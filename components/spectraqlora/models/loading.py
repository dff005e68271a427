"""Loading base models, 4-bit models and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.artifacts import FourBitModel, ModelOutline
from spectraqlora.models.families import auto_class, plain_linears, quantizable_t5
from spectraqlora.models.hardware import device
from spectraqlora.models.modules import without_cpu_packing
from spectraqlora.models.tensors import LocalTensors, Tensors
from spectraqlora.places import base_place

if TYPE_CHECKING:
    import torch


def original_folder(manifest: ModelOutline) -> Path:
    """Local folder of the model that was quantized; fetched again where another machine did that."""
    here = Path(manifest.source_path)
    if not manifest.source_content and here.is_dir():
        return here
    place = base_place(manifest.source, manifest.revision, manifest.trust_remote_code)
    return place.local_copy(manifest.source_content)


def original_tensors(manifest: ModelOutline) -> Tensors:
    """Tensors of the model that was quantized; those at an s3:// address are read where they are.

    Raises:
        InputError: the original is not there any more, or is another one.
    """
    if not manifest.source_content:
        return LocalTensors(original_folder(manifest))
    from spectraqlora.models.remote_tensors import S3Tensors
    from spectraqlora.storage import ObjectChanged

    place = base_place(manifest.source)
    if place.digest() != manifest.source_content:
        raise ObjectChanged(place.field, place, "the content that was quantized; it was replaced since")
    return S3Tensors(place.address)


def load_four_bit(folder: str | Path, on: str = "") -> tuple[Any, FourBitModel]:
    """The 4-bit model on a device, by default the best one, in evaluation mode, with its manifest."""
    import torch
    from transformers import AutoConfig

    manifest = FourBitModel.read(folder)
    path, trust = Path(folder) / "model", manifest.trust_remote_code
    with plain_linears(), quantizable_t5():
        model = auto_class(AutoConfig.from_pretrained(path, trust_remote_code=trust)).from_pretrained(
            path,
            dtype=getattr(torch, manifest.compute_dtype),
            device_map={"": on or device()},
            trust_remote_code=trust,
        )
    without_cpu_packing(model)
    model.eval()
    return model, manifest


def load_plain(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """An unquantized model from safetensors on the best device."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return auto_class(config).from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        device_map={"": device()},
        trust_remote_code=trust_remote_code,
    )


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; padding falls back to the end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
