"""Models in 4 bits: NF4 with double quantization (QLoRA, arXiv 2305.14314) through bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.models.families import auto_class, plain_linears, quantizable_t5
from spectraqlora.models.hardware import device
from spectraqlora.models.modules import dequantized_weight, without_cpu_packing

if TYPE_CHECKING:
    import torch


def load_in_four_bit(source: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A model whose linear layers are quantized while it loads, on the best device.

    Args:
        source: folder of safetensors.
        dtype: compute type, and type of what stays unquantized.
        trust_remote_code: let code next to the model run.
    """
    from transformers import AutoConfig, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    with plain_linears(), quantizable_t5():
        model = auto_class(config).from_pretrained(
            source,
            dtype=dtype,
            device_map={"": device()},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                # One type for all parameters: FSDP shards them together, and T5 asks `wo` for its type.
                bnb_4bit_quant_storage=dtype,
            ),
        )
    without_cpu_packing(model)
    return model


def four_bit_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers whose weight is packed in 4 bits, by name."""
    import bitsandbytes as bnb

    return {n: module for n, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters of a model in all, and how many of them are 4-bit; packed ones count unpacked."""
    import bitsandbytes as bnb

    four_bit = sum(layer.out_features * layer.in_features for layer in four_bit_layers(model).values())
    plain = sum(p.numel() for p in model.parameters() if not isinstance(p, bnb.nn.Params4bit))
    return plain + four_bit, four_bit


def unquantized(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that are not packed."""
    import bitsandbytes as bnb

    return [n for n, p in model.named_parameters() if not isinstance(p, bnb.nn.Params4bit)]


def copy_dequantized(four_bit: torch.nn.Module, plain: torch.nn.Module, transposed: set[str]) -> None:
    """Give a plain model the weights of its 4-bit form, layer by layer.

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
