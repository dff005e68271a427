"""Models in 4 bits: NF4 with double quantization (QLoRA, arXiv 2305.14314) through bitsandbytes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.models.experts import packed_experts
from spectraqlora.models.families import auto_class, fused_experts, plain_linears, quantizable_t5, stays_plain
from spectraqlora.models.hardware import device
from spectraqlora.models.inspection import check_loaded
from spectraqlora.models.modules import dequantized_weight, without_cpu_packing
from spectraqlora.models.plain import plain_folder
from spectraqlora.models.tensors import quantization

if TYPE_CHECKING:
    import torch


def load_in_four_bit(source: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A model whose linear layers and fused experts are quantized while it loads, on the best device.

    One that bitsandbytes has already in 4 bits keeps its own codes; other packed weights are unpacked before.

    Args:
        source: folder of safetensors.
        dtype: compute type, and type of what stays unquantized.
        trust_remote_code: let code next to the model run.

    Raises:
        InputError: some of its weights are missing, and would be random.
    """
    from transformers import AutoConfig, BitsAndBytesConfig

    from spectraqlora.models.expert_loading import experts_in_four_bit

    own = own_four_bit(source)
    with (
        contextlib.nullcontext(source) if own else plain_folder(source) as folder,
        plain_linears(),
        quantizable_t5(),
        fused_experts(),
        experts_in_four_bit(),
    ):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if own:
            config.quantization_config = {**own, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
            quantize: dict[str, Any] = {"config": config}
        else:
            quantize = {
                "quantization_config": BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=dtype,
                    # One type for all parameters: FSDP shards them together, and T5 asks `wo` for its type.
                    bnb_4bit_quant_storage=dtype,
                    llm_int8_skip_modules=_left_plain(config, trust_remote_code),
                )
            }
        model, info = auto_class(config).from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device()},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **quantize,
        )
    check_loaded(info, type(model).__name__, source)
    _forget_conversions(model)
    without_cpu_packing(model)
    return model


def _left_plain(config: Any, trust_remote_code: bool) -> list[str] | None:
    """Ends of the names of layers that stay plain; None where these are those that transformers leaves, such as the head."""
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    layers = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    kept = {re.sub(r"^.*\.\d+\.", "", name) for name in layers if stays_plain(name, config)}
    return [*get_keys_to_not_convert(model), *sorted(kept)] if kept else None


def _forget_conversions(model: Any) -> None:
    """Let a 4-bit model be saved as it is in memory, where transformers would undo what it did to load it.

    What read packed states has no way back, and needs none: bitsandbytes writes the states itself. What fused experts
    would cut their codes up again.
    """
    packed = [name for name, _ in packed_experts(model)]
    kept = []
    for conversion in getattr(model, "_weight_conversions", None) or ():
        try:
            back = conversion.reverse_transform()
        except NotImplementedError:  # How transformers says that a step has no way back.
            continue
        renames = not hasattr(conversion, "operations")
        if renames or not any(back.rename_source_key(name)[1] for name in packed):
            kept.append(conversion)
    model._weight_conversions = kept


def own_four_bit(folder: Path) -> Mapping[str, Any]:
    """bitsandbytes' settings of a model that is in 4 bits already; empty where it is not."""
    config = folder / "config.json"
    settings = quantization(config.read_text(encoding="utf-8") if config.exists() else None, folder)
    return settings if settings.get("load_in_4bit") or settings.get("_load_in_4bit") else {}


def four_bit_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers whose weight is packed in 4 bits, by name."""
    import bitsandbytes as bnb

    return {n: module for n, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters of a model in all, and how many of them are 4-bit; packed ones count unpacked."""
    import bitsandbytes as bnb

    four_bit = sum(layer.out_features * layer.in_features for layer in four_bit_layers(model).values())
    four_bit += sum(tensor.numel() for _, tensor in packed_experts(model))
    plain = sum(p.numel() for p in model.parameters() if not isinstance(p, bnb.nn.Params4bit))
    return plain + four_bit, four_bit


def unquantized(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that are not packed."""
    import bitsandbytes as bnb

    return [n for n, p in model.named_parameters() if not isinstance(p, bnb.nn.Params4bit)]


def copy_dequantized(four_bit: torch.nn.Module, plain: torch.nn.Module, transposed: set[str]) -> None:
    """Give a plain model the weights of its 4-bit form, one layer or fused tensor after the other.

    Args:
        four_bit: the 4-bit model.
        plain: the same model unquantized; changed in place.
        transposed: layers whose plain weight is stored in x out (GPT-2's Conv1D).
    """
    import torch

    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in four_bit_layers(four_bit).items():
            weight = dequantized_weight(layer)
            layers[name].weight.copy_(weight.T if name in transposed else weight)
        for name, tensor in packed_experts(four_bit):
            plain.get_parameter(name).copy_(tensor.dequantized())
