"""How LoRA's factors multiply: in which type, and shared ones (one A, one B of several modules) once."""

from __future__ import annotations

from typing import Any

import torch

from spectraqlora.artifacts import RankMap, Shared
from spectraqlora.models.modules import module_block

_ADAPTER = "default"
_SHARED: dict[Shared, tuple[str, ...]] = {"pair": ("lora_A", "lora_B"), "A": ("lora_A",), "B": ("lora_B",)}


class Factor(torch.nn.Linear):
    """A or B in float32, whose product with an input is made in the input's type: as autocast does it, and no more.

    Args:
        linear: A (rank x in) or B (out x rank) as PEFT made it; its weight becomes this one's.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x·Wᵀ, in the type of x."""
        return torch.nn.functional.linear(input, self.weight.to(input.dtype))


class SharedProjection(Factor):
    """A shared A: modules that read the same tensor get the same x·Aᵀ, computed for the first one that asks.

    The cast of the input and its dropout are part of it, so that they, too, happen once. What is kept is given up at
    the end of the block (`release`), and as soon as another input comes.

    Args:
        linear: A as PEFT made it, rank x in; its weight becomes the shared one.
        dropout: on the input.
    """

    def __init__(self, linear: torch.nn.Linear, dropout: torch.nn.Module) -> None:
        super().__init__(linear)
        self.keeps_type = False
        """Whether an input stays in its type; else the product is made in that of A."""
        self._dropout = dropout
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x·Aᵀ (… x rank) of an input (… x in)."""
        if self._kept is None or self._kept[0] is not input:
            cast = input if self.keeps_type else input.to(self.weight.dtype)
            self._kept = input, super().forward(self._dropout(cast))
        return self._kept[1]

    def release(self, *_: Any) -> None:
        """Give up what is kept; also a hook's signature."""
        self._kept = None


def share_factors(model: Any, layers: dict[str, Any], rank_map: RankMap) -> None:
    """Let the modules of every group use their first one's factors, in place.

    A group that shares B starts with B at random and every A at 0, mirrored to one that shares A: the shared factor says
    which directions, and the function does not jump.

    Args:
        model: PEFT model.
        layers: its LoRA layers by the base model's module name.
        rank_map: which modules are in which group, and what they share.
    """
    first: dict[int, Any] = {}
    for entry in rank_map.active():
        if entry.group is None:
            continue
        layer = layers[entry.module]
        if entry.group not in first:
            first[entry.group] = layer
            if entry.shared == "B":
                bound = layer.out_features**-0.5
                torch.nn.init.uniform_(layer.lora_B[_ADAPTER].weight, -bound, bound)
            elif entry.shared == "A" and _ADAPTER not in layer.lora_variant:
                layer.lora_A[_ADAPTER] = SharedProjection(
                    layer.lora_A[_ADAPTER], layer.lora_dropout[_ADAPTER]
                )
        for name in _SHARED[entry.shared]:
            getattr(layer, name)[_ADAPTER] = getattr(first[entry.group], name)[_ADAPTER]
        if entry.shared == "B":
            torch.nn.init.zeros_(layer.lora_A[_ADAPTER].weight)
        if isinstance(layer.lora_A[_ADAPTER], SharedProjection):
            # Both happen inside the projection, once.
            layer.lora_dropout[_ADAPTER], layer.cast_input_dtype_enabled = torch.nn.Identity(), False
            block = model.get_base_model().get_submodule(module_block(entry.module))
            block.register_forward_hook(layer.lora_A[_ADAPTER].release, always_call=True)


def keep_input_types(layers: dict[str, Any]) -> None:
    """Let LoRA layers multiply in the type of their input, in place; DoRA's, which take norms, stay in float32."""
    for layer in layers.values():
        if _ADAPTER in layer.lora_variant:
            continue
        layer.cast_input_dtype_enabled = False
        for factors in (layer.lora_A, layer.lora_B):
            if isinstance(factors[_ADAPTER], SharedProjection):
                factors[_ADAPTER].keeps_type = True
            else:
                factors[_ADAPTER] = Factor(factors[_ADAPTER])
