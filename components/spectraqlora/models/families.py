"""What differs between model families, in one place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from spectraqlora.errors import InputError


def auto_class(config: Any) -> Any:
    """The transformers class that loads a model with its language-model head; of one that also sees, all of it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    kinds = AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping
    if type(config) in kinds[1]:
        # Some name their language model alone as the one that generates text (Llama 4).
        alone = kinds[0].get(type(config), None)
        if alone is None or alone.config_class is not type(config):
            return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Inside, an attribute of a module, class or object is another."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextlib.contextmanager
def plain_linears() -> Iterator[None]:
    """Build Falcon from `nn.Linear`, which computes the same: bitsandbytes leaves its own class unpacked."""
    from torch import nn
    from transformers.models.falcon import modeling_falcon

    with replaced(modeling_falcon, "FalconLinear", nn.Linear):
        yield


@contextlib.contextmanager
def quantizable_t5() -> Iterator[None]:
    """Let T5's `wo` be 4-bit: transformers keeps it in float32 against overflows of float16 alone."""
    from transformers import T5PreTrainedModel

    with replaced(T5PreTrainedModel, "_keep_in_fp32_modules", None):
        yield


@contextlib.contextmanager
def fused_experts() -> Iterator[None]:
    """Keep Llama 4's experts in the fused tensors of its checkpoint, which transformers exchanges for layers in 4 bits."""
    from transformers.quantizers import base

    with replaced(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {}):
        yield


_ROUTER = re.compile(r"(^|\.)(gate|shared_expert_gate|\w*router\w*)(\.|$)")
"""Layers that choose experts, in all families: the least of the weights, and the last to be rounded."""
_READ_PAST = {
    "bamba": ("mamba.out_proj",),
    "falcon_h1": ("mamba.out_proj",),
    "falcon_mamba": ("mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"),
    "gemma3n_text": ("altup.correction_coefs", "altup.prediction_coefs"),
    "granitemoehybrid": ("mamba.out_proj",),
    "jamba": ("mamba.dt_proj",),
    "mamba": ("mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"),
    "mamba2": ("mixer.out_proj",),
    "nemotron_h": ("mixer.out_proj",),
    "zamba2": ("mamba.out_proj",),
}
"""Layers whose weights a family's code, or its kernels on a GPU, read past the layer, by the language model's type."""


def stays_plain(layer: str, config: Any) -> bool:
    """Whether a linear layer stays unquantized and without an adapter.

    Routers do, and layers whose weight is read past them: packed it would be codes, and an adapter without effect.

    Args:
        layer: its name, or its name and `.weight`.
        config: the model's; None where there is none.
    """
    layer = layer.removesuffix(".weight")
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    past = _READ_PAST.get(getattr(text, "model_type", ""), ())
    return bool(_ROUTER.search(layer)) or layer.endswith(tuple(f".{name}" for name in past))


def context_length(config: Any) -> int | None:
    """How many tokens a model has positions for; None where its config does not say."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


def pad_id(config: Any) -> int:
    """The id to pad inputs with, where the attention mask hides it: the language model's own, or 0."""
    text = config.get_text_config(decoder=True)
    own = getattr(text, "pad_token_id", None)
    return int(own) if isinstance(own, int) and 0 <= own < text.vocab_size else 0


def decoder_start(config: Any) -> int | None:
    """Token that starts an encoder-decoder's output; None for decoder-only models."""
    if not config.is_encoder_decoder:
        return None
    start = config.decoder_start_token_id
    return int(start) if start is not None else pad_id(config)


PACKABLE = frozenset(
    [
        "apertus",
        "arcee",
        "codegen",
        "cohere",
        "cohere2",
        "deepseek_v3",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "granite",
        "granitemoe",
        "llama",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    ]
)
"""Model types that compute the same of rows in one sequence as of each by itself, where positions tell them apart."""


def check_packable(config: Any) -> None:
    """Refuse to let rows share sequences in a family that mixes them, or of which that is not known (InputError)."""
    if config.model_type not in PACKABLE:
        raise InputError(
            "data.packing",
            "rows",
            f"off; {config.model_type} mixes rows that share a sequence, or is not known to keep them apart",
        )


def settle_tie(model: Any) -> bool:
    """Let the config of a loaded model not call its head tied where a checkpoint has both, and transformers left them apart.

    Other programs go by the config alone, and would compute with the embeddings in the head's place. Encoder-decoders
    are left alone: some scale what their head reads by the same word.

    Returns:
        Whether the config said so.
    """
    head = model.get_output_embeddings()
    if (
        head is None
        or model.config.is_encoder_decoder
        or not getattr(model.config, "tie_word_embeddings", False)
    ):
        return False
    if head.weight is model.get_input_embeddings().weight:
        return False
    model.config.tie_word_embeddings = False
    return True


def check_computes(model: Any, source: object) -> None:
    """Refuse a 4-bit model that does not compute numbers, or whose predictions see the tokens that come after them.

    Models that read weights past their layers do not bear packed ones; encoders such as BERT load as language models but
    look ahead.

    Raises:
        InputError: a forward pass fails, or gives what is no number; or changing later tokens changes earlier logits.
    """
    import torch

    if model.config.is_encoder_decoder:
        return
    half = model.config.get_text_config().vocab_size // 2
    ids = torch.arange(16, device=model.device)[None] % half
    other = ids.clone()
    other[0, 8:] += half
    try:
        with torch.no_grad():
            before, after = (model(input_ids=each).logits[0, :8].float() for each in (ids, other))
            model.train()  # Some compute otherwise there.
            model(input_ids=ids)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            "model.base_model", source, f"a model that computes from 4-bit weights; this one fails ({first})"
        ) from None
    finally:
        model.eval()
    if not bool(torch.isfinite(before).all()):
        raise InputError(
            "model.base_model",
            source,
            "a model that computes numbers; this one's predictions are NaN or infinite, though its weights are not: see "
            "rope_parameters and scales in its config.json",
        )
    # Rounding may differ a little where kernels group rows, as with experts.
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
    if float((before - after).abs().max()) > tolerance * float(before.abs().max()):
        raise InputError(
            "model.base_model", source, "a model that predicts from what comes before; this one looks ahead"
        )
