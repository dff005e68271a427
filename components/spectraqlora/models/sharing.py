"""LoRA factors that several modules share: one A whose product with an input is computed once, one B."""

from __future__ import annotations

from typing import Any

import torch

from spectraqlora.artifacts import RankMap, Shared
from spectraqlora.models.modules import module_block

_ADAPTER = "default"
_SHARED: dict[Shared, tuple[str, ...]] = {"pair": ("lora_A", "lora_B"), "A": ("lora_A",), "B": ("lora_B",)}


class SharedProjection(torch.nn.Linear):
    """A shared A: modules that read the same tensor get the same x·Aᵀ, computed for the first one that asks.

    The cast of the input and its dropout are part of it, so that they, too, happen once. What is kept is given up at
    the end of the block (`release`), and as soon as another input comes.

    Args:
        linear: A as PEFT made it, rank x in; its weight becomes the shared one.
        dropout: on the input.
    """

    def __init__(self, linear: torch.nn.Linear, dropout: torch.nn.Module) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self._dropout = dropout
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x·Aᵀ (… x rank) of an input (… x in)."""
        if self._kept is None or self._kept[0] is not input:
            cast = input if torch.is_autocast_enabled() else input.to(self.weight.dtype)
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
