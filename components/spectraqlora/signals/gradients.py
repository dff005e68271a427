"""Gradients of the loss with respect to full weights, kept only as random sketches.

For a linear layer y = x Wᵀ the gradient is G = δᵀx summed over tokens. Per batch and module we keep
Y = Gᵀ P (in x k) with P (out x k) a scaled random orthonormal basis, the same for equal shapes; the two-sided
sketch is Qᵀ Y (k x k). Such projections keep inner products in expectation (Johnson-Lindenstrauss), with
less variance than Gaussian ones, so cosines between sketches estimate cosines between gradients. Y spans the leading
directions of G's input side; of modules that write into the residual stream Z = G Q (out x k), which spans those of
the output side, is kept as well (randomized range finders: Halko, Martinsson and Tropp, arXiv 0909.4061).

Sketches are stored as `sketches.safetensors`: two or three float32 tensors a module, and the modules' numbers as JSON
in the file's metadata.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spectraqlora.artifacts import LinearModule, ModuleRank, RankMap
from spectraqlora.errors import InputError
from spectraqlora.models.modules import residual_width
from spectraqlora.runtime.disk import ask

SKETCHES = "sketches.safetensors"
_RANGE, _TWO_SIDED, _OUTPUT, _NUMBERS = "range", "two_sided", "output", "gradient_snr"


@dataclass
class GradientSketch:
    """Of one module: the mean gradient's range sketch, its two-sided sketch and the batches' spread."""

    range_sketch: torch.Tensor
    """Mean of Y over batches (in_features x k)."""
    sketch: torch.Tensor
    """Two-sided sketch of the mean gradient (k x k)."""
    gradient_snr: float
    """Squared norm of the mean gradient over the variance of the batches' gradients."""
    output_sketch: torch.Tensor | None = None
    """Mean of Z over batches (out_features x k), of a module that writes into the residual stream."""

    def energy(self, rank: int) -> float:
        """Sum of the `rank` largest squared singular values of the mean gradient: what a rank-r update can follow."""
        values = torch.linalg.svdvals(self.sketch)
        return float((values[:rank] ** 2).sum())


Take = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with a layer's input (… x in) and the gradient of its output (… x out)."""


class _Watched(torch.autograd.Function):
    """Passes a layer's output on; its gradient goes to `take` with the input, which autograd keeps or recomputes."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, inputs: torch.Tensor, take: Take) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.take = take
        # A copy: some models then change the output in place.
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
def blocks_recomputed(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a forward pass keeps the inputs of the blocks alone; the backward pass recomputes each block.

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


class _Sketcher:
    """Sums one module's sketch over batches.

    Args:
        info: the module.
        left: projection of the output side (out x k).
        right: projection of the input side (in x k).
        outputs: whether the output side is sketched as well.
    """

    def __init__(
        self, info: LinearModule, left: torch.Tensor, right: torch.Tensor, outputs: bool = False
    ) -> None:
        self.info, self._left, self._right, self._outputs = info, left, right, outputs
        self._batch: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._squares = 0.0

    def take(self, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add one use of the layer in the current batch: its input (… x in) and output gradient (… x out)."""
        delta = gradient.reshape(-1, self.info.out_features).float()
        x = inputs.reshape(-1, self.info.in_features).float()
        part = x.T @ (delta @ self._left)
        self._batch = part if self._batch is None else self._batch + part
        if self._outputs:
            part = delta.T @ (x @ self._right)
            self._output = part if self._output is None else self._output + part

    def end_batch(self) -> None:
        """Close the current batch."""
        if self._batch is None:
            return
        self._total = self._batch if self._total is None else self._total + self._batch
        self._squares += float((self._batch**2).sum())
        self._batch = None

    def sketch(self, batches: int) -> GradientSketch | None:
        """The sketch of the mean over all batches; none where no gradient ever reached the module."""
        if self._total is None:
            return None
        mean = self._total / batches
        norm = float((mean**2).sum())
        # Unbiased variance of the batches' gradients, summed over entries.
        variance = max((self._squares - batches * norm) / max(batches - 1, 1), 1e-30)
        output = None if self._output is None else (self._output / batches).cpu()
        return GradientSketch(mean.cpu(), (self._right.T @ mean).cpu(), norm / variance, output)


def sketch_gradients(
    model: Any, modules: list[LinearModule], batches: Iterable[dict[str, torch.Tensor]], size: int, seed: int
) -> dict[str, GradientSketch]:
    """One backward pass per batch serves all modules; the model's weights are not touched.

    Of the forward pass only the blocks' inputs are kept (`blocks_recomputed`).

    No gradient is asked for below the first of `modules`. Adapters on a module change its gradient only
    through the loss: what is measured is the gradient with respect to the weight under them.

    Args:
        model: language model, frozen; it may be 4-bit and hold adapters.
        modules: the modules to measure.
        batches: model inputs with labels.
        size: side k of the sketch; sides of at most k are not projected.
        seed: of the projections.

    Returns:
        A sketch of every module that a gradient reached.

    Raises:
        ValueError: there are no batches.
    """
    device = next(model.parameters()).device
    named = dict(getattr(getattr(model, "base_model", model), "model", model).named_modules())
    named |= dict(model.named_modules())
    # Modules of equal sides share their projections.
    projection = functools.cache(lambda features, seed: _projection(features, size, seed, device))
    width = residual_width(modules)
    sketchers = [
        _Sketcher(
            info,
            projection(info.out_features, 2 * seed),
            projection(info.in_features, 2 * seed + 1),
            outputs=info.out_features == width,
        )
        for info in modules
    ]
    handles = [watch(named[sketcher.info.module], sketcher.take) for sketcher in sketchers]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    count = 0
    try:
        with blocks_recomputed(model):
            for batch in batches:
                inputs = {key: value.to(device) for key, value in batch.items()}
                model(**inputs, use_cache=False).loss.backward()
                count += 1
                for sketcher in sketchers:
                    sketcher.end_batch()
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("no calibration batches")
    sketches = {sketcher.info.module: sketcher.sketch(count) for sketcher in sketchers}
    return {name: sketch for name, sketch in sketches.items() if sketch is not None}


def starting_directions(sketches: Mapping[str, GradientSketch], rank_map: RankMap) -> dict[str, torch.Tensor]:
    """The first A (rank x in) of every module, or of a group by its first one: leading directions of the mean gradient.

    A group that shares A starts it from the leading directions of its members' gradients stacked; one that shares B has
    the first B (out x rank) under `module.lora_B` instead, from their output side. A module that no gradient reached has
    no sketch and starts at random. The norm of a row of A, or of a column of B, is that of a Kaiming-uniform one, so
    that the learning rate means the same.

    A has the directions of LoRA-GA's (arXiv 2407.05000), by a sketch in place of the whole gradient. LoRA-GA also starts
    B, from the directions that follow, and takes B·A out of the weight; here B is 0, and the 4-bit base stays as it is.
    """
    sharing: dict[str | int, list[ModuleRank]] = {}
    for entry in rank_map.active():
        sharing.setdefault(entry.module if entry.group is None else entry.group, []).append(entry)
    starts = {}
    for members in sharing.values():
        first, reached = members[0], [sketches[m.module] for m in members if m.module in sketches]
        if first.shared == "B":
            outputs = [s.output_sketch for s in reached if s.output_sketch is not None]
            if outputs:
                starts[f"{first.module}.lora_B"] = _leading(torch.cat(outputs, dim=1), first.rank)
        elif reached:
            ranges = [sketch.range_sketch for sketch in reached]
            pooled = torch.stack(ranges).mean(0) if first.shared == "pair" else torch.cat(ranges, dim=1)
            starts[first.module] = _leading(pooled, first.rank).T.contiguous()
    return starts


def _leading(sketch: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading left singular vectors (features x rank), each of the norm of a Kaiming-uniform one."""
    directions: torch.Tensor = torch.linalg.svd(sketch, full_matrices=False)[0][:, :rank]
    return (directions / 3**0.5).contiguous()


def write_sketches(sketches: Mapping[str, GradientSketch], folder: Path) -> None:
    """Write `sketches.safetensors` into a folder; reading it gives the same numbers, bit by bit."""
    tensors = {f"{name}.{_RANGE}": s.range_sketch.contiguous() for name, s in sketches.items()}
    tensors |= {f"{name}.{_TWO_SIDED}": s.sketch.contiguous() for name, s in sketches.items()}
    tensors |= {
        f"{name}.{_OUTPUT}": s.output_sketch.contiguous()
        for name, s in sketches.items()
        if s.output_sketch is not None
    }
    numbers = json.dumps({name: s.gradient_snr for name, s in sketches.items()})
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{SKETCHES}.partial"
    ask(folder, sum(tensor.nbytes for tensor in tensors.values()), "the gradients' sketches")
    save_file(tensors, partial, metadata={_NUMBERS: numbers})
    partial.replace(folder / SKETCHES)


def read_sketches(folder: Path) -> dict[str, GradientSketch]:
    """The sketches that `write_sketches` wrote, in the same order; empty where the folder has none.

    Raises:
        InputError: the file is no safetensors file of sketches, or cut short.
    """
    path = folder / SKETCHES
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as stored:
            numbers: dict[str, float] = json.loads(stored.metadata()[_NUMBERS])
            names = set(stored.keys())
            return {
                name: GradientSketch(
                    stored.get_tensor(f"{name}.{_RANGE}"),
                    stored.get_tensor(f"{name}.{_TWO_SIDED}"),
                    snr,
                    stored.get_tensor(f"{name}.{_OUTPUT}") if f"{name}.{_OUTPUT}" in names else None,
                )
                for name, snr in numbers.items()
            }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        raise InputError("gradient sketches", path, "a readable file; it is cut short or malformed") from None
