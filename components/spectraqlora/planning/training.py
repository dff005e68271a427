"""How much memory training takes.

A 4-bit model with LoRA adapters takes, with b bytes per number of the compute type:

    weights      n/2 packed + n/64 block scales + n/16384 · 4 scales of scales, for the n 4-bit parameters,
                 and b for each of the others (embeddings, norms, head)
    adapters     4 each (float32); their gradients 4 each; AdamW's two moments 8 each (8-bit: 2)
    activations  what the forward pass keeps for the backward pass, counted (see activations). With gradient
                 checkpointing one input per block, and all tensors of the block that runs again
    working set  the largest dequantized weight (of experts a whole fused tensor) and the gradients of one block's
                 widest tensors
    loss         hidden states that count, and one chunk of logits (see scoring.head_loss)
    workspaces   on a GPU, what its matrix products keep

The sum is compared with measured peaks by a test.
"""

from __future__ import annotations

from dataclasses import dataclass

from spectraqlora.artifacts import RankMap
from spectraqlora.methods.catalogue import method
from spectraqlora.methods.ranks import by_type
from spectraqlora.planning.activations import kept_activations
from spectraqlora.planning.shape import FLOAT32, ModelShape
from spectraqlora.settings import Settings
from spectraqlora.signals.scores import Scores

WORKSPACES = 64 * 2**20
"""Bytes that cuBLAS and cuBLASLt keep on a GPU once they have run: 32 MiB each on Hopper, less on older ones."""
_LOGITS = 2 * FLOAT32
"""Per logit of a loss without gradient: itself and its logarithm after softmax."""


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one train step, bytes, by what takes it."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept at the start of the backward pass."""
    block: int
    """Kept next to them by the block that gradient checkpointing runs again; 0 without it."""
    working: int
    loss: int
    probe: int
    """Logits of one row, made once before the first step, to compare the model's own loss with ours."""
    workspaces: int
    """Of matrix products on a GPU."""

    @property
    def trained(self) -> int:
        """Adapters, their gradients and the optimizer's moments: there as long as training lasts."""
        return self.adapters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The peak: the first step's probe, the loss, or a block's backward pass, which never meet."""
        step = self.weights + self.trained + self.activations + max(self.block + self.working, self.loss)
        return self.workspaces + max(step, self.weights + self.adapters + self.probe)

    @property
    def above_weights(self) -> int:
        """The peak above the loaded model."""
        return self.total - self.weights


def surrogate_map(name: str, shape: ModelShape, settings: Settings) -> RankMap:
    """The rank map of a method before anything was measured, at the most that it can cost.

    Which modules have signal is not known yet. They are spread over the layers, different ones for different
    types, the first layer's among them: gradients then flow through the whole model, and few modules share
    an input that is kept. No gradients are there to group modules by: every one gets its own pair.

    Args:
        name: the method.
        shape: of the base model.
        settings: of the run.
    """
    types = {kind: index for index, kind in enumerate(by_type(shape.modules))}
    scores: Scores = {}
    for info in shape.modules:
        # Multiples of the golden ratio, modulo one, spread evenly.
        spread = (0.618034 * (info.layer + 1) + 0.381966 * types[info.type]) % 1 + 0.001
        scores[info.module] = (spread + (info.layer == 0), spread)
    return method(name).first_ranks(shape.modules, scores, settings.select, settings.seed, {})


def training(shape: ModelShape, rank_map: RankMap, settings: Settings, cuda: bool) -> TrainingMemory:
    """Memory of training a rank map's adapters with batches of full rows.

    Args:
        shape: of the base model.
        rank_map: which modules get an adapter, and of which rank.
        settings: of the run.
        cuda: whether a GPU trains.
    """
    from spectraqlora.models import adapters
    from spectraqlora.models.activations import every_nth

    model = adapters.attach(shape.build(), rank_map, settings.train.lora_dropout, cuda=cuda)
    rows, tokens = settings.train.batch_size, shape.row_tokens(settings)
    kept = kept_activations(model, rows, tokens, padded=not settings.data.pack, cuda=cuda)
    count = adapters.trainable_parameters(model)
    recomputing = cuda or method(rank_map.method).recomputes
    every = every_nth(settings.train.gradient_checkpointing, recomputing)
    activations, block = kept.with_recomputation(every)
    moments = 2 * (FLOAT32 if settings.train.optimizer == "adamw" else 1)
    copy = shape.dtype_bytes if shape.dtype_bytes == 2 else 0
    return TrainingMemory(
        weights=shape.weight_bytes,
        adapters=FLOAT32 * count,
        gradients=FLOAT32 * count,
        optimizer=moments * count,
        activations=activations,
        block=block,
        working=shape.working(rows * tokens),
        loss=shape.loss(rows * tokens, cuda),
        probe=tokens * (shape.vocabulary * (_LOGITS + copy) + 2 * shape.hidden * shape.dtype_bytes),
        workspaces=WORKSPACES if cuda else 0,
    )
