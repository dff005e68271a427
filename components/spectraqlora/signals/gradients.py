"""Gradients of the loss with respect to full weights, kept only as random sketches.

For a linear layer y = x Wᵀ the gradient is G = δᵀx summed over tokens. Per batch and module we keep
Y = Gᵀ P (in x k) with P (out x k) a scaled random orthonormal basis, the same for equal shapes; the two-sided
sketch is Qᵀ Y (k x k). Such projections keep inner products in expectation (Johnson-Lindenstrauss), with
less variance than Gaussian ones, so cosines between sketches estimate cosines between gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from spectraqlora.artifacts import LinearModule


@dataclass
class GradientSketch:
    """Of one module: the mean gradient's range sketch, its two-sided sketch and the batches' spread."""

    range_sketch: torch.Tensor
    """Mean of Y over batches (in_features x k)."""
    sketch: torch.Tensor
    """Two-sided sketch of the mean gradient (k x k)."""
    gradient_snr: float
    """Squared norm of the mean gradient over the variance of the batches' gradients."""

    def energy(self, rank: int) -> float:
        """Sum of the `rank` largest squared singular values: what a rank-r update can follow."""
        values = torch.linalg.svdvals(self.sketch)
        return float((values[:rank] ** 2).sum())


Take = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with a layer's input (… x in) and the gradient of its output (… x out)."""


class _Watched(torch.autograd.Function):
    """Passes a layer's output on; its gradient goes to `take` with the input, which autograd keeps or makes again."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, inputs: torch.Tensor, take: Take) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.take = take
        # A copy: some models go on to change the output in place.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.take(*ctx.saved_tensors, gradient)
        return gradient, None, None


def watch(layer: torch.nn.Module, take: Take) -> Any:
    """Let `take` see every backward pass through a linear layer; returns the hook's handle."""

    def hook(_: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            output.requires_grad_(True)
        watched: torch.Tensor = _Watched.apply(output, args[0].detach(), take)
        return watched

    return layer.register_forward_hook(hook)


@contextlib.contextmanager
def blocks_made_again(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a forward pass keeps the inputs of the blocks alone; the backward pass runs each block again.

    Unlike transformers' switch for it this needs no training mode, so dropout stays off, and asks for no gradients
    below the blocks. Models whose blocks know no recomputation keep everything.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: Any = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    before = [(block.gradient_checkpointing, block.training) for block in blocks]
    for block in blocks:
        block.gradient_checkpointing = block.training = True
        block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for block, (recomputing, training) in zip(blocks, before, strict=True):
            block.gradient_checkpointing, block.training = recomputing, training


def _projection(features: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    if size >= features:
        return torch.eye(features, device=device)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + features)
    basis = torch.linalg.qr(torch.randn(features, size, generator=generator))[0]
    return (basis * (features / size) ** 0.5).to(device)


def sketch_gradients(
    model: Any, modules: list[LinearModule], batches: Iterable[dict[str, torch.Tensor]], size: int, seed: int
) -> dict[str, GradientSketch]:
    """One backward pass per batch serves all modules; the model's weights are not touched.

    Of the forward pass only the blocks' inputs are kept (`blocks_made_again`).

    No gradient is asked for below the first of `modules`. Adapters on a module change its gradient only
    through the loss: what is measured is the gradient with respect to the weight under them.

    Args:
        model: language model, frozen; it may be 4-bit and hold adapters.
        modules: the modules to measure.
        batches: model inputs with labels.
        size: side k of the sketch; sides shorter than k are kept whole.
        seed: of the projections.
    """
    device = next(model.parameters()).device
    named = dict(getattr(getattr(model, "base_model", model), "model", model).named_modules())
    named |= dict(model.named_modules())
    current: dict[str, torch.Tensor] = {}

    def sketching(info: LinearModule) -> Take:
        left = _projection(info.out_features, size, 2 * seed, device)

        def take(inputs: torch.Tensor, gradient: torch.Tensor) -> None:
            narrow = gradient.reshape(-1, info.out_features).float() @ left
            part = inputs.reshape(-1, info.in_features).float().T @ narrow
            current[info.module] = current[info.module] + part if info.module in current else part

        return take

    handles = [watch(named[info.module], sketching(info)) for info in modules]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    total: dict[str, torch.Tensor] = {}
    squares: dict[str, float] = {}
    count = 0
    try:
        with blocks_made_again(model):
            for batch in batches:
                current.clear()
                inputs = {key: value.to(device) for key, value in batch.items()}
                model(**inputs, use_cache=False).loss.backward()
                count += 1
                for name, value in current.items():
                    total[name] = total[name] + value if name in total else value.clone()
                    squares[name] = squares.get(name, 0.0) + float((value**2).sum())
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("no calibration batches")
    found = {}
    for info in modules:
        if info.module not in total:
            continue
        mean = total[info.module] / count
        right = _projection(info.in_features, size, 2 * seed + 1, device)
        norm = float((mean**2).sum())
        # Unbiased variance of the batches' gradients, summed over entries.
        variance = max((squares[info.module] - count * norm) / max(count - 1, 1), 1e-30)
        found[info.module] = GradientSketch(mean.cpu(), (right.T @ mean).cpu(), norm / variance)
    return found
