"""The linear modules of a model: their names, types and shapes, and their weights unpacked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from spectraqlora.artifacts import LinearModule
from spectraqlora.errors import InputError
from spectraqlora.models.families import stays_plain

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"\.(\d+)\.")


def module_identity(name: str) -> tuple[int, str] | None:
    """(layer index, module type) of a dotted module path; None outside numbered layers.

    The type is what follows the first index, as in Spectrum; that of an encoder begins with `encoder.`.
    """
    match = _LAYER.search(name)
    if match is None:
        return None
    stack = "encoder." if name.removeprefix("model.").startswith("encoder.") else ""
    return int(match.group(1)), stack + name[match.end() :]


def module_block(name: str) -> str:
    """The numbered block that a module is in: its path up to the first index; the module itself outside of them."""
    match = _LAYER.search(name)
    return name if match is None else name[: match.end() - 1]


def residual_width(modules: Iterable[LinearModule]) -> int:
    """Width of the residual stream: what most matrices of the blocks read; 0 of no modules."""
    widths = Counter(m.in_features for m in modules)
    return max(widths, key=lambda width: (widths[width], -width), default=0)


def language_part(model: Any) -> str:
    """The prefix of the language model's modules in a model that also sees or hears; empty where all of it is one."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    if text is None or text is config or getattr(config, "is_encoder_decoder", False):
        return ""
    parts = [
        name
        for name, module in model.named_modules()
        if name and type(getattr(module, "config", None)) is type(text)
    ]
    return min(parts, key=len) + "." if parts else ""


def linear_modules(model: torch.nn.Module) -> list[LinearModule]:
    """Every linear layer inside numbered blocks of the language model, by its own name and its unpacked shape.

    Routers, and layers whose weight is read past them, are not among them.
    """
    import bitsandbytes as bnb
    import torch
    from transformers.pytorch_utils import Conv1D

    modules = []
    language, config = language_part(model), getattr(model, "config", None)
    for name, module in model.named_modules():
        identity = module_identity(name)
        if identity is None or not name.startswith(language) or stays_plain(name, config):
            continue
        four_bit = isinstance(module, bnb.nn.Linear4bit)
        if isinstance(module, torch.nn.Linear):
            out_features, in_features = int(module.out_features), int(module.in_features)
        elif isinstance(module, Conv1D):
            in_features, out_features = (int(side) for side in module.weight.shape)
        else:
            continue
        modules.append(
            LinearModule(
                module=name,
                type=identity[1],
                layer=identity[0],
                out_features=out_features,
                in_features=in_features,
                four_bit=four_bit,
                transposed=Conv1D in (type(module), getattr(module, "source_cls", None)),
            )
        )
    return modules


def candidates(model: Any, source: object) -> list[LinearModule]:
    """The linear modules that may get an adapter.

    Raises:
        InputError: there are none.
    """
    from spectraqlora.models.adapters import adaptable

    modules = adaptable(model, linear_modules(model))
    if not modules:
        raise InputError(
            "model.base_model", source, "linear layers inside numbered decoder blocks; found none"
        )
    return modules


def without_cpu_packing(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for its bfloat16 CPU kernel in evaluation mode.

    It fails unless the input width is a multiple of 64, and the numbers would depend on the machine.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantized_weight(module: torch.nn.Module) -> torch.Tensor:
    """Weight of a linear layer as float32 (out x in), dequantized where it is packed."""
    import bitsandbytes as bnb

    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.detach().float()
