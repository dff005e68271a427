"""How transformers packs fused experts while it loads a model, and loads packed ones: its way for layers, extended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from bitsandbytes.nn import Params4bit
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from spectraqlora.models.experts import can_pack, hold, pack
from spectraqlora.models.families import replaced


class _Pack(Bnb4bitQuantize):  # type: ignore[misc, unused-ignore]
    """Packs a layer's weight as transformers does, a fused tensor as we do."""

    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        model, config = context["model"], self.hf_quantizer.quantization_config
        packed: dict[str, Any] = {}
        for name, value in input_dict.items():
            if not _fused(model, name):
                packed |= super().convert({name: value}, **context)
                continue
            packed[name] = pack(
                value[0] if isinstance(value, list) else value,
                config.bnb_4bit_quant_type,
                config.bnb_4bit_use_double_quant,
                config.bnb_4bit_quant_storage,
            )
            _hold(model, name, packed[name])
        return packed


class _Read(ConversionOps):  # type: ignore[misc, unused-ignore]
    """Puts codes and scales of a fused tensor together; one that is not packed stays as it is."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # By which transformers knows not to cast what is read.

    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        name = context["full_layer_name"]
        parts = {key.removeprefix(name).removeprefix("."): value[0] for key, value in input_dict.items()}
        codes = parts.pop("")
        if not parts:
            return {name: codes.to(context["model"].get_parameter(name).dtype)}
        packed = Params4bit.from_prequantized(codes, parts, device=codes.device)
        _hold(context["model"], name, packed)
        return {name: packed}


class _Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc, unused-ignore]
    """transformers' quantizer of 4 bits, for layers and fused tensors of experts."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return _fused(model, param_name) or bool(
            super().param_needs_quantization(model, param_name, **kwargs)
        )

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized:
            return conversions
        (parts,) = self.serialized_names.values()
        fused = [name for name, p in model.named_parameters() if can_pack(name, p.shape)]
        return [
            WeightConverter([name + part.removeprefix("weight") for part in parts], name, [_Read(self)])
            for name in fused
        ] + conversions


def _fused(model: Any, name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    own = model.get_submodule(module)._parameters.get(parameter)
    return own is not None and can_pack(name, own.shape)


def _hold(model: Any, name: str, packed: Any) -> None:
    module, _, parameter = name.rpartition(".")
    hold(model.get_submodule(module), parameter, packed.quant_state)


@contextlib.contextmanager
def experts_in_four_bit() -> Iterator[None]:
    """Inside, transformers packs fused experts with the layers, and loads them packed."""
    quantizers = {**auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit": _Quantizer}
    with replaced(auto, "AUTO_QUANTIZER_MAPPING", quantizers):
        yield
