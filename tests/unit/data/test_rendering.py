"""Token ids and labels of rows, with a real tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from spectraqlora.artifacts import IGNORED
from spectraqlora.data.layouts import recognise
from spectraqlora.data.rendering import RenderedRow, Renderer
from spectraqlora.data.rows import Origin, Row
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_tokenizer

PLAIN = "Question: {prompt}\nAnswer:"
# Every turn in a line of its own, the prompt of an answer being all before it.
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Drops what the assistant said before, as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages if m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "who is mara?"},
    {"role": "assistant", "content": "a baker"},
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "in oslo"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def renderer(tokenizer: Any, template: str | None = None, **more: Any) -> Renderer:
    tokenizer.chat_template = template
    return Renderer(tokenizer, PLAIN, more.get("encoder_decoder", False))


def as_row(record: dict[str, Any]) -> Row:
    return recognise(record).row(record, Origin("d.jsonl", 1))


def rendered(maker: Renderer, record: dict[str, Any]) -> RenderedRow:
    return maker.render(as_row(record))


def counted(tokenizer: Any, row: RenderedRow) -> str:
    return tokenizer.decode(
        [t for t, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    )


def test_only_the_answer_and_its_end_count(tokenizer: Any) -> None:
    row = rendered(renderer(tokenizer), {"question": "who?", "answer": "mara"})
    assert tokenizer.decode(row.input_ids) == "<s>Question: who?\nAnswer: mara</s>"
    assert counted(tokenizer, row) == " mara</s>"
    assert row.length == len(row.input_ids)


def test_every_turn_of_the_assistant_counts(tokenizer: Any) -> None:
    row = rendered(renderer(tokenizer, CHATML), {"messages": TURNS})
    assert counted(tokenizer, row) == "a baker</s>in oslo</s>"
    assert not row.text.startswith("<s>"), "a chat template brings its own beginning"


def test_of_a_template_that_rewrites_history_only_the_last_turn_counts(tokenizer: Any) -> None:
    row = rendered(renderer(tokenizer, FORGETFUL), {"messages": TURNS})
    assert counted(tokenizer, row) == "in oslo</s>"
    assert row.text == "<user>who is mara?\n<user>where?\n<assistant>in oslo"


def test_turns_without_a_chat_template_are_named(tokenizer: Any) -> None:
    row = rendered(renderer(tokenizer), {"messages": TURNS})
    assert counted(tokenizer, row).endswith(" in oslo</s>")
    assert "user: where?\nassistant: in oslo" in row.text


def test_all_of_plain_text_counts(tokenizer: Any) -> None:
    row = rendered(renderer(tokenizer), {"text": "mara likes red"})
    assert row.labels == row.input_ids
    assert tokenizer.decode(row.input_ids) == "<s>mara likes red</s>"


def test_an_encoder_decoder_reads_the_question_and_learns_the_reply(tokenizer: Any) -> None:
    maker = renderer(tokenizer, encoder_decoder=True)
    row = rendered(maker, {"question": "who?", "answer": "mara"})
    assert tokenizer.decode(row.input_ids) == "Question: who?\nAnswer:</s>"
    assert tokenizer.decode(row.labels) == "mara</s>"
    assert maker.question(as_row({"question": "who?", "answer": "mara"})) == (
        "Question: who?\nAnswer:</s>",
        "mara",
    )


def test_an_encoder_decoder_refuses_plain_text(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="encoder-decoder"):
        rendered(renderer(tokenizer, encoder_decoder=True), {"text": "mara"})


def test_answers_that_can_be_compared_are_short_or_marked(tokenizer: Any) -> None:
    maker = renderer(tokenizer)
    assert maker.question(as_row({"question": "who?", "answer": "mara"})) == (
        "<s>Question: who?\nAnswer:",
        "mara",
    )
    long = "because " * 20
    assert maker.question(as_row({"question": "why?", "answer": long})) is None
    assert maker.question(as_row({"question": "why?", "answer": f"{long} #### 7"})) is not None
    assert renderer(tokenizer).question(as_row({"text": "mara"})) is None
