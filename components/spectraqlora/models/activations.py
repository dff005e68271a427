"""What the backward pass keeps: matrix products, or only the inputs of blocks; elementwise results never.

A gated MLP computes down(act(gate) * up). Autograd keeps gate, up, act(gate) and, under an adapter of down,
the product. The last two follow from the first two by one cheap operation each, so they are not kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import gelu, silu

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


@dataclass(frozen=True)
class _Recomputed:
    """A tensor as the autograd node that computed it.

    The node still has its inputs when the tensor is asked for: a backward pass reaches the operations that
    used a tensor before the one that computed it.
    """

    node: Any
    shape: torch.Size

    def tensor(self) -> torch.Tensor:
        name = self.node.name()
        if name == "SiluBackward0":
            tensor = silu(self.node._saved_self)
        elif name == "GeluBackward0":
            tensor = gelu(self.node._saved_self, approximate=self.node._saved_approximate)
        else:
            tensor = self.node._saved_self * self.node._saved_other
        return tensor.view(self.shape)


def _pack(tensor: torch.Tensor) -> torch.Tensor | _Recomputed:
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None:
        return tensor
    name = node.name()
    # A product keeps both factors only where both need gradients.
    both = name == "MulBackward0" and all(after is not None for after, _ in node.next_functions)
    if both or name in ("SiluBackward0", "GeluBackward0"):
        return _Recomputed(node, tensor.shape)
    return tensor


def recomputed(tensor: torch.Tensor) -> bool:
    """Whether `recompute_elementwise` computes this tensor anew instead of keeping it."""
    return isinstance(_pack(tensor), _Recomputed)


def _unpack(packed: torch.Tensor | _Recomputed) -> torch.Tensor:
    with torch.no_grad():
        return packed.tensor() if isinstance(packed, _Recomputed) else packed


@contextlib.contextmanager
def recompute_elementwise() -> Iterator[None]:
    """Inside, activation functions and products of two activations are not kept for the backward pass.

    Gradients are the same numbers: the same operation runs again on the same inputs.
    """
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def every_nth(choice: str, auto: bool) -> int:
    """Every how many blocks one runs again in the backward pass, by the name in the settings; 0 is none.

    Args:
        choice: the setting.
        auto: whether `auto` is on.
    """
    if choice == "auto":
        choice = "on" if auto else "off"
    return {"on": 1, "some": 2, "off": 0}[choice]


def recompute_blocks(model: Any, every: int) -> None:
    """Keep the input of every `every`-th block alone, and run the block again in the backward pass.

    Unlike transformers' switch for this, no gradient is forced into the embeddings: blocks below the first
    adapter still have no backward pass.
    """
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    base.disable_input_require_grads()
