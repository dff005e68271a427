"""What memory depends on: a model's shapes, from its config alone."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from spectraqlora.artifacts import LinearModule
from spectraqlora.errors import InputError, NoAnswer
from spectraqlora.models.experts import can_pack
from spectraqlora.models.families import auto_class, context_length
from spectraqlora.models.modules import candidates, linear_modules
from spectraqlora.places import base_place, kind_of
from spectraqlora.settings import Settings

FLOAT32 = 4
"""Bytes per number."""
_BLOCK, _SCALE_BLOCK = 64, 256
_WORKING_TENSORS = 3
"""Gradients as wide as the widest tensor of a block that are alive at once in its backward pass."""

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "65b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Llama shapes that `plan` knows by name (7B, 13B and 65B of the first Llama, 70B of the second)."""


def config_of(source: str, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The transformers config of a shape's name (7B, 13B, 65B, 70B), a folder, or a hub id.

    Raises:
        InputError: it is none of these, or the hub cannot be reached.
    """
    from transformers import AutoConfig, LlamaConfig

    if source.lower() in SHAPES:
        return LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, **SHAPES[source.lower()])
    shapes = f"or for the command plan {', '.join(name.upper() for name in SHAPES)}"
    folder = source
    if kind_of(source) == "hub":
        place = base_place(source, revision, trust_remote_code)
        try:
            folder = str(place.hub_description(place.digest(offline=True)))
        except InputError as error:
            expected = str(error).partition(": expected ")[2]
            kind = NoAnswer if isinstance(error, NoAnswer) else InputError
            raise kind("model.base_model", source, f"{expected}, {shapes}") from None
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            "model.base_model", source, f"a model folder or a hub id ({first}), {shapes}"
        ) from None


class ModelShape:
    """A model without its weights: what memory depends on. All sizes are in bytes.

    Args:
        config: transformers config.
        dtype: the compute type's name: float32, bfloat16 or float16.

    Raises:
        InputError: it is no language model that generates text, or nothing in it can get an adapter.
    """

    def __init__(self, config: Any, dtype: str) -> None:
        self.config, self.dtype = config, dtype
        self.dtype_bytes = FLOAT32 if dtype == "float32" else FLOAT32 // 2
        # Asked before the model is built, which writes its own type into the config.
        self.stored_bytes = int(getattr(config.dtype, "itemsize", 0)) or self.dtype_bytes
        model = self.build()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.largest_tensor = max(p.numel() for p in model.parameters())
        linear = linear_modules(model)
        fused = [p.numel() for name, p in model.named_parameters() if can_pack(name, p.shape)]
        self.four_bit = sum(m.out_features * m.in_features for m in linear) + sum(fused)
        self.modules: list[LinearModule] = candidates(model, config.model_type)
        self.largest = max(m.out_features * m.in_features for m in linear)
        self.dequantized = max(self.largest, *fused, 0)
        self.widest = max(max(m.out_features, m.in_features) for m in linear)
        embeddings = model.get_input_embeddings().weight
        self.vocabulary, self.hidden = (int(side) for side in embeddings.shape)

    def row_tokens(self, settings: Settings) -> int:
        """Tokens of a full row: data.max_length, or all that the model has positions for."""
        return min(settings.data.max_length, context_length(self.config) or settings.data.max_length)

    def build(self) -> Any:
        """The model on the meta device, unquantized: its modules and shapes are those of the 4-bit one."""
        import torch

        try:
            with torch.device("meta"):
                model = auto_class(self.config).from_config(self.config, dtype=getattr(torch, self.dtype))
        except (ValueError, KeyError) as error:
            raise InputError(
                "model.base_model",
                self.config.model_type,
                f"a language model that generates text ({str(error).splitlines()[0]})",
            ) from None
        return model.train()

    @cached_property
    def weight_bytes(self) -> int:
        """The 4-bit model: n/2 packed, n/64 scales, n/16384 · 4 scales of scales, and what stays unquantized."""
        blocks = math.ceil(self.four_bit / _BLOCK)
        constants = blocks + math.ceil(blocks / _SCALE_BLOCK) * FLOAT32
        return math.ceil(self.four_bit / 2) + constants + self.dtype_bytes * (self.parameters - self.four_bit)

    @property
    def plain_bytes(self) -> int:
        """The unquantized model in its compute type."""
        return self.dtype_bytes * self.parameters

    def working(self, positions: int) -> int:
        """The largest weight, or fused tensor of experts, dequantized, and the widest tensors of a block's pass."""
        return self.dtype_bytes * (self.dequantized + _WORKING_TENSORS * positions * self.widest)

    def loss(self, positions: int, cuda: bool) -> int:
        """Hidden states, their gradient, and one chunk of logits with its softmax and gradient."""
        from spectraqlora.scoring.head_loss import chunk_bytes

        chunk = min(max(1, chunk_bytes(cuda) // (FLOAT32 * self.vocabulary)), positions) * self.vocabulary
        return 3 * positions * self.hidden * self.dtype_bytes + 3 * FLOAT32 * chunk

    def past(self, rows: int, tokens: int) -> int:
        """Keys and values of every layer, for rows of so many tokens, and the states of recurrent ones."""
        text = self.config.get_text_config(decoder=True)
        every = getattr(text, "num_attention_heads", None) or 0
        heads = getattr(text, "num_key_value_heads", None) or every
        width = getattr(text, "head_dim", None) or self.hidden // max(every, 1)
        layers = max(m.layer for m in self.modules) + 1
        keys = 2 * tokens * heads * width * self.dtype_bytes if every else 0
        return layers * rows * (keys + FLOAT32 * _state(text, self.hidden))


def _state(text: Any, hidden: int) -> int:
    """Numbers in the state that a state-space or linear-attention layer hands to the next token; 0 without such layers."""
    inner = hidden * (getattr(text, "expand", None) or getattr(text, "mamba_expand", None) or 0)
    mamba = inner * (getattr(text, "state_size", None) or getattr(text, "mamba_d_state", None) or 0)
    heads = getattr(text, "linear_num_value_heads", None) or 0
    delta = heads * getattr(text, "linear_key_head_dim", 0) * getattr(text, "linear_value_head_dim", 0)
    return int(max(mamba, delta))
