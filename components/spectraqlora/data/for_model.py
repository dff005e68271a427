"""What rows are rendered with: a model's tokenizer, and the tokens that a row may have; no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectraqlora.data.known_templates import give_template
from spectraqlora.data.rendering import Renderer
from spectraqlora.errors import InputError
from spectraqlora.models.families import check_packable, context_length
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.places import Place
from spectraqlora.settings import DataSettings


@dataclass(frozen=True)
class RowModel:
    """What renders rows for a model.

    Args:
        tokenizer: the model's.
        renderer: of rows.
        length: tokens that a row may have: `data.max_length`, or the model's positions where those are fewer.
        encoder_decoder: whether the model reads the prompt in one sequence and answers in another.
    """

    tokenizer: Any
    renderer: Renderer
    length: int
    encoder_decoder: bool


def row_model(folder: Path, settings: DataSettings, trust_remote_code: bool = False) -> RowModel:
    """What renders rows for the model whose config and tokenizer a folder has.

    Raises:
        InputError: they cannot be loaded, or settings of the `data` section do not fit them.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError("model.base_model", folder, f"a model with config and tokenizer ({first})") from None
    if settings.packing == "rows":
        check_packable(config)
    if settings.chat_template:
        give_template(tokenizer, settings.chat_template)
    pairs = bool(config.is_encoder_decoder)
    length = min(settings.max_length, context_length(config) or settings.max_length)
    renderer = Renderer(tokenizer, settings.prompt_template, pairs, settings.train_on)
    return RowModel(tokenizer, renderer, length, pairs)


def description_of(base: Place, scratch: Path, commit: str = "") -> Path:
    """A folder with a base model's config and tokenizer: its own, or a copy without the weights.

    Args:
        base: of kind path, hub or s3.
        scratch: a folder for what an address has.
        commit: of the hub; empty takes the place's revision.

    Raises:
        InputError: it is not there, or its hub or store does not answer.
    """
    if base.kind == "s3":
        return base.description(scratch)[0]
    return base.hub_description(commit) if base.kind == "hub" else base.path
