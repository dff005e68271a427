"""Templates for models without one: the known families', and files."""

from __future__ import annotations

from pathlib import Path

import pytest
from spectraqlora.data.known_templates import KNOWN, give_template, portable, template_text
from spectraqlora.data.rendering import render
from spectraqlora.errors import InputError

from tests.chat_templates import FAMILIES, plain_tokenizer, tokenizer_of

SHAPES = {
    "chatml": "chatml",
    "gemma": "gemma_3",
    "llama-2": "llama_2",
    "llama-3": "llama_3",
    "mistral": "mistral_tekken",
    "phi-3": "phi_3",
    "vicuna": "vicuna",
    "zephyr": "zephyr",
}
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "bye"},
]


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_family_gives_a_model_its_template(name: str) -> None:
    family = FAMILIES[SHAPES[name]]
    tokenizer = plain_tokenizer(family.bos, family.eos)
    give_template(tokenizer, name)
    row = render(tokenizer, TURNS)
    answers = [family.answer("hello", False), family.answer("bye", True)]
    assert [row.text[start:end] for start, end in row.spans] == answers
    assert row.text == render(tokenizer_of(SHAPES[name]), TURNS).text


def test_every_known_family_is_tried_and_named_in_the_settings() -> None:
    from spectraqlora.settings import DataSettings

    assert set(KNOWN) == set(SHAPES)
    described = DataSettings.model_fields["chat_template"].description or ""
    assert all(name in described for name in KNOWN)


def test_a_file_is_packed_so_that_it_holds_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "my.jinja"
    file.write_text("{% for m in messages %}é {{ m.content }}{{ eos_token }}{% endfor %}", encoding="utf-8")
    packed = portable(str(file))
    assert "{" not in packed
    assert template_text(packed) == template_text(str(file)) == file.read_text(encoding="utf-8")
    assert (portable(packed), portable("chatml"), portable("")) == (packed, "chatml", "")


def test_what_is_no_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.jinja").write_text("no braces")
    (tmp_path / "raising.jinja").write_text("{{ raise_exception('no') }}")
    for value in ("chatmll", str(tmp_path / "no.jinja"), str(tmp_path)):
        with pytest.raises(InputError, match=r"data\.chat_template: .*chatml, gemma"):
            portable(value)
    with pytest.raises(InputError, match="renders a user's and an assistant's message"):
        give_template(plain_tokenizer(), str(tmp_path / "raising.jinja"))


def test_a_template_whose_end_is_no_token_of_the_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} [over and out]\n{% endfor %}")
    with pytest.raises(InputError, match="is a token of the model's; zephyr"):
        give_template(plain_tokenizer(), str(file))
