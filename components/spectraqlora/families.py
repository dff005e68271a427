"""What differs between model families, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def auto_class(config: Any) -> Any:
    """The transformers class that loads a model with its language-model head."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


@contextlib.contextmanager
def plain_linears() -> Iterator[None]:
    """Build Falcon from `nn.Linear`, which computes the same: bitsandbytes leaves its own class unpacked."""
    from torch import nn
    from transformers.models.falcon import modeling_falcon

    own = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = own


@contextlib.contextmanager
def quantizable_t5() -> Iterator[None]:
    """Let T5's `wo` be 4-bit: transformers keeps it in float32 against overflows of float16 alone."""
    from transformers import T5PreTrainedModel

    kept = T5PreTrainedModel._keep_in_fp32_modules
    T5PreTrainedModel._keep_in_fp32_modules = None
    try:
        yield
    finally:
        T5PreTrainedModel._keep_in_fp32_modules = kept


def decoder_start(config: Any) -> int | None:
    """Token that starts an encoder-decoder's output; None for decoder-only models."""
    if not config.is_encoder_decoder:
        return None
    start = config.decoder_start_token_id
    return int(start if start is not None else config.pad_token_id or 0)
