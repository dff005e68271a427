"""Loss from hidden states: logits are made only for the positions that count, a chunk at a time.

With a vocabulary of V a plain loss holds rows x tokens x V float32 numbers several times over. Here the
head sees only labelled positions (completions), and no more than `chunk_bytes` of logits exist at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from spectraqlora.artifacts import IGNORED

_CHUNK_BYTES, _CHUNK_BYTES_OF_GPU = 16 * 2**20, 256 * 2**20
_TOLERANCE = 1e-3


def chunk_bytes(cuda: bool) -> int:
    """Logits in float32 that exist at once: what a CPU's caches hold; a GPU reads the whole head for each chunk."""
    return _CHUNK_BYTES_OF_GPU if cuda else _CHUNK_BYTES


class _FrozenHead(torch.autograd.Function):
    """Cross-entropy of states (positions x width) through a frozen head, `size` positions at a time.

    The gradient of one position's loss with respect to its state is (softmax(logits) - onehot) W, which is
    known as soon as the logits are: it is computed with them, and the backward pass only scales its rows.
    Nothing of the vocabulary's width outlives its chunk, and no logits are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        size: int,
    ) -> torch.Tensor:
        slopes = torch.empty_like(states) if states.requires_grad else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logits = linear(states[part], weight, bias).float()
            losses[part] = cross_entropy(logits, targets[part], reduction="none")
            if slopes is not None:
                slope = logits.softmax(1)
                slope[torch.arange(len(slope), device=slope.device), targets[part]] -= 1
                slopes[part] = slope.to(weight.dtype) @ weight
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradient[:, None] * slopes).to(slopes.dtype), None, None, None, None


class HeadLoss:
    """Cross-entropy of a language model whose head is a linear layer on the last hidden states.

    Families that change logits after their head (soft caps, scales) are noticed by comparing both losses on
    `probe`; their logits are made by the model itself, for every position.

    Args:
        model: transformers model, PEFT-wrapped or not.
        probe: a small batch with labels.
    """

    def __init__(self, model: Any, probe: dict[str, torch.Tensor]) -> None:
        self.shift = not model.config.is_encoder_decoder
        self.head = model.get_output_embeddings()
        self.from_hidden = isinstance(self.head, torch.nn.Linear)
        self.from_hidden = self.from_hidden and self._fits(model, probe)

    @contextlib.contextmanager
    def hidden_states(self) -> Iterator[None]:
        """Inside, the model's `logits` are the hidden states that its head would have read. May be nested."""
        if not self.from_hidden or "forward" in vars(self.head):
            yield
            return
        self.head.forward = lambda hidden: hidden
        try:
            yield
        finally:
            del self.head.forward

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """Which predictions count (rows x tokens)."""
        return (labels[:, 1:] if self.shift else labels) != IGNORED

    def kept(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's `logits` (positions x width) and labels (positions) that count."""
        keep = self.counted(labels)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return logits[keep], labels[keep]

    def losses(self, kept: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of every position that counts (nats)."""
        size = max(1, chunk_bytes(kept.is_cuda) // (4 * int(self.head.weight.shape[0])))
        if self.from_hidden:
            losses: torch.Tensor = _FrozenHead.apply(kept, labels, self.head.weight, self.head.bias, size)
            return losses

        def part(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return cross_entropy(logits.float(), targets, reduction="none")

        if len(labels) <= size:
            return part(kept, labels)
        # Recomputed in the backward pass, so that float32 logits exist for one chunk at a time.
        chunks = zip(kept.split(size), labels.split(size), strict=True)
        return torch.cat([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks])

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Mean loss per counted token, as `transformers.Trainer` asks for it."""
        losses = self.losses(*self.kept(outputs.logits, labels))
        return losses.sum() / (num_items_in_batch if num_items_in_batch is not None else max(len(losses), 1))

    @torch.no_grad()
    def _fits(self, model: Any, probe: dict[str, torch.Tensor]) -> bool:
        training = model.training
        model.eval()
        try:
            own = float(model(**probe).loss)
            inputs = {key: value for key, value in probe.items() if key != "labels"}
            with self.hidden_states():
                ours = float(self(model(**inputs), probe["labels"]))
        except RuntimeError:
            # Something of the vocabulary's width follows the head, such as BART's bias.
            return False
        finally:
            model.train(training)
        return abs(own - ours) <= _TOLERANCE * max(abs(own), 1.0)
