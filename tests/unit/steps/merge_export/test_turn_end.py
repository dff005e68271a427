"""An exported model stops where the answers that it learned from end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from spectraqlora.artifacts import PreparedRows
from spectraqlora.data.rendering import Renderer
from spectraqlora.steps.merge_export.turn_end import end_turns

from tests.chat_templates import plain_tokenizer, tokenizer_of


class _Model:
    """What is exported of a model besides its weights."""

    def __init__(self, eos: int | list[int] | None) -> None:
        from transformers import GenerationConfig

        self.generation_config = GenerationConfig(eos_token_id=eos)


def rows(tokenizer: Any, chat_template: str = "") -> PreparedRows:
    values = {name: 1 for name in ("train_rows", "eval_rows", "train_tokens")}
    return PreparedRows.model_construct(
        source="d", digest="d", layout="chat", examples=[], answers=[], **values,
        turn_ends=Renderer(tokenizer, "{prompt}").turn_ends(), chat_template=chat_template,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "eos"),
    [("chatml", "<|im_end|>"), ("gemma_2", "<end_of_turn>"), ("phi_3", "<|endoftext|>"), ("zephyr", "</s>")],
)
def test_it_ends_with_the_templates_token(name: str, eos: str, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = copy.deepcopy(tokenizer_of(name))
    own, ends = tokenizer.eos_token_id, Renderer(tokenizer, "{prompt}").turn_ends()
    model = _Model(own)
    end_turns(model, tokenizer, rows(tokenizer))
    stops = model.generation_config.eos_token_id
    assert set(stops if isinstance(stops, list) else [stops]) == {own, *ends}
    assert tokenizer.eos_token == eos, "a template that writes the end of sequence itself keeps it"
    assert bool(capfd.readouterr().out) == (ends[0] != own)


def test_a_given_template_is_exported() -> None:
    tokenizer = plain_tokenizer()
    text = tokenizer_of("zephyr").chat_template
    end_turns(_Model(None), tokenizer, rows(tokenizer, text))
    assert tokenizer.chat_template == text


def test_a_model_that_ends_nothing_is_left_as_it_is() -> None:
    tokenizer, model = plain_tokenizer("<s>", None), _Model(None)
    end_turns(model, tokenizer, rows(tokenizer))
    assert model.generation_config.eos_token_id is None
    assert tokenizer.eos_token is None
