"""The shapes of Llama-3.1-8B, and tiny ones of the same form for the dry run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama with an untied head."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def name(self) -> str:
        return f"{self.layers} layers"

    def cut(self, layers: int) -> Shape:
        """The same with fewer layers."""
        return replace(self, layers=layers)

    def config(self) -> Any:
        """As transformers wants it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
            rope_theta=500_000.0,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    def matrices(self, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """(tensor, rows x columns) of one layer."""
        narrow = self.hidden // self.heads * self.key_value_heads
        sides = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        for module, shape in sides.items():
            yield f"model.layers.{layer}.{module}.weight", shape


@dataclass(frozen=True)
class Sizes:
    """What the check runs on."""

    model: Shape
    part_layers: int
    """Layers of the model that is trained before the complete one."""
    tokens: int
    batches: tuple[int, ...]
    """Rows of a step, the most telling first."""
    scan_layers: int

    def steps(self, batch: int) -> int:
        """Optimizer steps of a training: the first warms up, the others are timed; the longest have one."""
        return 2 if batch == max(self.batches) else 3

    @property
    def stages(self) -> dict[str, Shape]:
        """The models that are trained, by the name of their folder."""
        return {"part": self.model.cut(self.part_layers), "complete": self.model}


FULL = Sizes(Shape(4096, 14_336, 32, 32, 8, 128_256), 4, 2048, (4, 1, 8), 2)
SMALL = Sizes(Shape(128, 256, 5, 4, 2, 640), 4, 32, (2, 1), 2)


def sizes(small: bool) -> Sizes:
    return SMALL if small else FULL
