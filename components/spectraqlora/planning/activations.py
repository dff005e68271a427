"""What a forward pass keeps for the backward pass: counted, not guessed.

The model's own code runs on tensors without storage (meta device), and every tensor that autograd saves is counted
once, for the block in which it was saved first.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from spectraqlora.models.activations import recomputed
from spectraqlora.models.families import replaced


@dataclass(frozen=True)
class KeptActivations:
    """Bytes that a forward pass keeps for the backward pass."""

    blocks: tuple[int, ...]
    """Of every decoder block, in order."""
    outside: int
    """Of everything else: embeddings, last norm."""
    inputs: tuple[int, ...]
    """Of every block's input alone: what gradient checkpointing keeps."""
    again: tuple[int, ...]
    """Of every block when it runs again in the backward pass, where elementwise results are kept as well."""

    def with_recomputation(self, every: int) -> tuple[int, int]:
        """What is kept when every `every`-th block runs again (0: none), and what the largest of those then adds."""
        chosen = range(0, len(self.blocks), every) if every else range(0)
        kept = [self.inputs[i] if i in chosen else block for i, block in enumerate(self.blocks)]
        return self.outside + sum(kept), max((self.again[i] for i in chosen), default=0)


def kept_activations(model: Any, rows: int, tokens: int, padded: bool, cuda: bool) -> KeptActivations:
    """Count what the forward pass of a model on the meta device would keep.

    Args:
        model: with adapters attached where they would be; frozen weights keep nothing of their inputs.
        rows: rows per forward pass.
        tokens: tokens per row.
        padded: rows have different lengths, so that attention gets a mask; it then repeats grouped keys and
            values for every head.
        cuda: for a GPU, whose fused attention also serves dropout.
    """
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    count = _Count(model)
    with (
        count.blocks_noticed(),
        _without_storage(padded, cuda),
        _without_logits(model),
        torch.autograd.graph.saved_tensors_hooks(count.save, lambda nothing: nothing),
    ):
        model(**batch, use_cache=False)
    return count.result()


class _Count:
    """Bytes of the tensors that autograd saves, by the block that saves them first; the model's own count nothing."""

    def __init__(self, model: Any) -> None:
        self._blocks = _blocks(model)
        own = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._counted: dict[tuple[bool, int], Any] = {}
        self._kept: Counter[int | None] = Counter()
        self._recomputed: Counter[int | None] = Counter()
        self._inputs: dict[int, int] = {}
        self._block: int | None = None

    def save(self, tensor: torch.Tensor) -> None:
        """Count a tensor that autograd saves; nothing of it is kept."""
        storage = tensor.untyped_storage()
        known = (recomputed(tensor), storage._cdata)
        if storage._cdata not in self._own and known not in self._counted:
            # Kept here too: a storage that is freed could give its address to the next one.
            self._counted[known] = storage
            (self._recomputed if known[0] else self._kept)[self._block] += storage.nbytes()

    @contextlib.contextmanager
    def blocks_noticed(self) -> Iterator[None]:
        """Inside, it is known which block runs, and how large its input is."""
        handles: list[Any] = []
        for index, block in enumerate(self._blocks):

            def enter(_: Any, arguments: tuple[Any, ...], named: dict[str, Any], index: int = index) -> None:
                hidden = arguments[0] if arguments else named["hidden_states"]
                self._block = index
                self._inputs[index] = hidden.numel() * hidden.element_size()

            def leave(*_: Any) -> None:
                self._block = None

            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> KeptActivations:
        """What was counted, of the blocks that ran: those of a vision tower do not."""
        indices = sorted(self._inputs)
        return KeptActivations(
            blocks=tuple(self._kept[index] for index in indices),
            outside=self._kept[None],
            inputs=tuple(self._inputs[index] for index in indices),
            again=tuple(self._kept[index] + self._recomputed[index] for index in indices),
        )


def _blocks(model: Any) -> list[Any]:
    """The numbered blocks: items of the outermost module lists."""
    blocks: list[Any] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(name.startswith(prefix) for prefix in outer):
            outer.append(f"{name}.")
            blocks += list(module)
    return blocks


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep: query, key, value, mask, result, and one number per row and head."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        rows, heads, tokens, _ = query.shape
        # Kernels write tokens before heads: the transposed result needs no copy.
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        normaliser = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        # A mask of booleans becomes numbers in every layer.
        kept = mask if mask is None or mask.dtype == query.dtype else mask.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, normaliser, kept)
        return out


@contextlib.contextmanager
def _without_logits(model: Any) -> Iterator[None]:
    """Inside, the head returns its input, as in training; not where something of the vocabulary's width follows it."""
    if getattr(model, "final_logits_bias", None) is not None:  # BART's
        yield
        return
    with replaced(model.get_output_embeddings(), "forward", lambda hidden: hidden):
        yield


@contextlib.contextmanager
def _without_storage(padded: bool, cuda: bool) -> Iterator[None]:
    """Let a model run on tensors that have no numbers."""
    from transformers import masking_utils

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *rest: Any,
        **more: Any,
    ) -> Any:
        # Where no fused kernel serves (dropout on a CPU, keys that are broadcast over heads) its parts are counted.
        grouped = key.shape[1] != query.shape[1] and not more.get("enable_gqa")
        if grouped or (dropout_p > 0 and not cuda):
            parts = torch.ops.aten._scaled_dot_product_attention_math
            causal = bool(more.get("is_causal", False))
            return parts(
                query, key, value, attn_mask, dropout_p, causal, enable_gqa=bool(more.get("enable_gqa"))
            )[0]
        return _FusedAttention.apply(query, key, value, attn_mask)

    every_of = torch.all

    def every(tensor: Any, *rest: Any, **more: Any) -> Any:
        # Whether a mask is all ones, which decides over masks of recurrent layers, has no numbers to be read from.
        found = every_of(tensor, *rest, **more)
        return found if found.ndim else torch.tensor(not padded)

    largest_of = torch.max

    def largest(tensor: Any, *rest: Any, **more: Any) -> Any:
        # Nor has the last position, by which rotary embeddings that stretch choose their frequencies.
        found = largest_of(tensor, *rest, **more)
        return torch.tensor(0) if torch.is_tensor(found) and not found.ndim else found

    with (
        replaced(torch, "max", largest),
        replaced(torch.nn.functional, "scaled_dot_product_attention", attention),
        # Experts: any one of them has the result's shape.
        replaced(torch.nn.functional, "grouped_mm", lambda rows, experts, **_: rows @ experts[0]),
        replaced(masking_utils, "find_packed_sequence_indices", lambda *_: None),
        replaced(masking_utils, "fast_all", lambda *_: not padded),
        replaced(torch, "all", every),
        replaced(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *_: not padded),
    ):
        yield
