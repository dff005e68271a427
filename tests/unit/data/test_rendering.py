"""Token ids and labels of rows, with real tokenizers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spectraqlora.artifacts import IGNORED
from spectraqlora.data.rendering import RenderedRow, Renderer, render
from spectraqlora.data.rows import Conversation, Origin, PromptCompletion, RowRefused, Text
from spectraqlora.data.tokens import labels_of, tokenized
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_tokenizer

from tests.chat_templates import plain_tokenizer, tokenizer_of

PLAIN = "Question: {prompt}\nAnswer:"
ORIGIN = Origin("data.jsonl", 1)
TURNS = [
    {"role": "user", "content": "who is mara?"},
    {"role": "assistant", "content": "a baker"},
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "in oslo"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """In Llama 2's manner: a space is put before a text, and stands for itself as part of the word after it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, max_token_length=8
    )
    words = "Question: How many apples are 1 and 2? Answer: There are 5 apples"
    made.train_from_iterator([words] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pair(prompt: str, completion: str) -> PromptCompletion:
    return PromptCompletion(prompt, completion, ORIGIN)


def talk(messages: list[dict[str, Any]], tools: Any = None) -> Conversation:
    return Conversation(messages, tools, ORIGIN)


def counted(tokenizer: Any, row: RenderedRow) -> str:
    return tokenizer.decode(
        [t for t, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    )


def test_only_the_answer_and_its_end_count(tokenizer: Any) -> None:
    row = Renderer(tokenizer, PLAIN).render(pair("who?", "mara"))
    assert tokenizer.decode(row.input_ids) == "<s>Question: who?\nAnswer: mara</s>"
    assert counted(tokenizer, row) == " mara</s>"
    assert row.length == len(row.input_ids)


def test_a_completion_that_brings_a_space_gets_none(tokenizer: Any) -> None:
    plain = Renderer(tokenizer, PLAIN).render(pair("who?", "mara"))
    assert Renderer(tokenizer, PLAIN).render(pair("who?", " mara")).input_ids == plain.input_ids
    assert Renderer(tokenizer, "{prompt}\n").render(pair("who?", "mara")).text == "who?\nmara"


def test_a_prompt_and_its_answer_have_the_tokens_of_the_whole_text(sentencepiece: Any) -> None:
    prompt, answer = "How many apples are 1 and 2?", "There are 5 apples"
    row = Renderer(sentencepiece, PLAIN).render(pair(prompt, answer))
    whole = sentencepiece(f"Question: {prompt}\nAnswer: {answer}", add_special_tokens=False)["input_ids"]
    start, end = sentencepiece.bos_token_id, sentencepiece.eos_token_id
    assert row.input_ids == [start, *whole, end]
    learned = [token for token in row.labels if token != IGNORED]
    tokens = sentencepiece.convert_ids_to_tokens(learned)
    assert tokens[0] != "▁" and "".join(tokens).startswith("▁There▁are▁5")
    assert tokens[-1] == "</s>"


def test_rendered_text_is_taken_as_it_is() -> None:
    tokenizer = plain_tokenizer("<s>", "</s>")
    row = Renderer(tokenizer, PLAIN).render(pair("<s>[INST] who? [/INST]", "mara</s>"))
    assert tokenizer.decode(row.input_ids) == "<s>[INST] who? [/INST]mara</s>"
    assert counted(tokenizer, row) == "mara</s>"
    text = Renderer(tokenizer, PLAIN).render(Text("<s>[INST] who? [/INST]mara</s>\n", ORIGIN))
    assert tokenizer.decode(text.input_ids) == "<s>[INST] who? [/INST]mara</s>\n"
    chat = Renderer(tokenizer_of("chatml"), PLAIN)
    made = chat.render(pair("<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n", "mara<|im_end|>"))
    assert made.text.count("<|im_start|>") == 2


def test_every_turn_of_the_assistant_counts() -> None:
    tokenizer = tokenizer_of("chatml")
    row = Renderer(tokenizer, PLAIN).render(talk(TURNS))
    assert counted(tokenizer, row) == "a baker<|im_end|>in oslo<|im_end|>"
    assert row.input_ids == tokenizer.apply_chat_template(TURNS)["input_ids"]


def test_a_prompt_and_a_completion_are_a_conversation_where_there_is_a_template() -> None:
    tokenizer = tokenizer_of("llama_3")
    renderer = Renderer(tokenizer, PLAIN)
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "mara"}]
    assert renderer.render(pair("who?", "mara")) == renderer.render(talk(messages))


def test_turns_without_a_chat_template_are_named(tokenizer: Any) -> None:
    row = Renderer(tokenizer, PLAIN).render(talk(TURNS))
    assert counted(tokenizer, row) == " a baker</s> in oslo</s>"
    assert "user: where?\nassistant: in oslo" in row.text
    prompt, answer = Renderer(tokenizer, PLAIN).question(talk(TURNS)) or ("", "")
    assert (answer, prompt) == ("in oslo", f"<s>{row.text.removesuffix(' in oslo</s>')}")
    off = [{**TURNS[0]}, {**TURNS[1], "weight": 0}, *TURNS[2:]]
    assert counted(tokenizer, Renderer(tokenizer, PLAIN).render(talk(off))) == " in oslo</s>"
    last = Renderer(tokenizer, PLAIN, train_on="last").render(talk(TURNS))
    assert (counted(tokenizer, last), last.unlearned) == (" in oslo</s>", {"data.train_on=last": 1})
    with pytest.raises(RowRefused, match="tool calls for a model without a chat template"):
        Renderer(tokenizer, PLAIN).render(talk([*TURNS[:1], {**TURNS[1], "tool_calls": [{}]}, *TURNS[2:]]))


def test_a_last_turn_of_the_users_is_read_and_not_learned(tokenizer: Any) -> None:
    row = Renderer(tokenizer, PLAIN).render(talk([*TURNS, {"role": "user", "content": "thanks"}]))
    assert row.text.endswith("user: thanks")
    assert row.labels[-1] == IGNORED
    assert counted(tokenizer, row) == " a baker</s> in oslo</s>"


def test_all_of_plain_text_counts(tokenizer: Any) -> None:
    row = Renderer(tokenizer, PLAIN).render(Text("mara likes red", ORIGIN))
    assert row.labels == row.input_ids
    assert tokenizer.decode(row.input_ids) == "<s>mara likes red</s>"
    all_of = Renderer(tokenizer, PLAIN, train_on="all").render(pair("who?", "mara"))
    assert all_of.labels == all_of.input_ids


def test_rows_rendered_together_are_what_they_are_alone(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, PLAIN)
    rows = [pair("who?", "mara"), talk(TURNS), talk(TURNS[:1]), Text("red", ORIGIN), pair("why?", " ")]
    made = renderer.render_all(rows)
    assert [isinstance(row, RowRefused) for row in made] == [False, False, True, False, True]
    assert [made[0], made[1], made[3]] == [renderer.render(row) for row in (rows[0], rows[1], rows[3])]


def test_an_encoder_decoder_reads_the_question_and_learns_the_reply(tokenizer: Any) -> None:
    maker = Renderer(tokenizer, PLAIN, encoder_decoder=True)
    row = maker.render(pair("who?", "mara"))
    assert tokenizer.decode(row.input_ids) == "Question: who?\nAnswer:</s>"
    assert tokenizer.decode(row.labels) == "mara</s>"
    assert maker.question(pair("who?", "mara")) == ("Question: who?\nAnswer:</s>", "mara")


def test_an_encoder_decoder_refuses_plain_text(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="encoder-decoder"):
        Renderer(tokenizer, PLAIN, encoder_decoder=True).render(Text("mara", ORIGIN))


def test_answers_that_can_be_compared_are_short_or_marked(tokenizer: Any) -> None:
    maker = Renderer(tokenizer, PLAIN)
    assert maker.question(pair("who?", "mara")) == ("<s>Question: who?\nAnswer:", "mara")
    long = "because " * 20
    assert maker.question(pair("why?", long)) is None
    assert maker.question(pair("why?", f"{long} #### 7")) is not None
    assert maker.question(Text("mara", ORIGIN)) is None
    assert maker.question(talk([*TURNS[:1], {**TURNS[1], "weight": 0}])) is None


def test_an_answer_is_asked_for_by_the_templates_own_prompt() -> None:
    tokenizer = tokenizer_of("qwen_25")
    question = Renderer(tokenizer, PLAIN).question(talk([*TURNS, {"role": "user", "content": "thanks"}]))
    wanted = tokenizer.apply_chat_template(TURNS[:3], tokenize=False, add_generation_prompt=True)
    assert question == (wanted, "in oslo")


def test_tokens_that_end_an_answer_are_the_templates_and_the_tokenizers() -> None:
    tokenizer = tokenizer_of("chatml")
    names = tokenizer.convert_ids_to_tokens(Renderer(tokenizer, PLAIN).turn_ends())
    assert names == ["<|im_end|>", "<|endoftext|>"]
    assert Renderer(plain_tokenizer("<s>", None), PLAIN).turn_ends() == []


class _WithoutOffsets:
    """A tokenizer as the slow ones are, which do not say what a token covers."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **given: Any) -> Any:
        assert "return_offsets_mapping" not in given
        return self._tokenizer(text, **given)


def test_a_slow_tokenizer_is_cut_where_tokens_begin_or_refused() -> None:
    for name in ("chatml", "llama_3", "gemma_3"):
        fast = tokenizer_of(name)
        slow = Renderer(_WithoutOffsets(fast), PLAIN).render(talk(TURNS))
        assert slow == Renderer(fast, PLAIN).render(talk(TURNS))
    merging = copy.copy(tokenizer_of("deepseek_v2"))
    merging.chat_template = (
        "{% for m in messages %}{{ 'sa' if m.role == 'assistant' else 'u ' }}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(RowRefused, match="not a fast one"):
        Renderer(_WithoutOffsets(merging), PLAIN).render(
            talk([{"role": "user", "content": "x"}, {"role": "assistant", "content": "ys"}])
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.listdir('/') }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{% set _ = messages.append('more') %}{{ messages }}",
    ],
)
def test_a_template_gets_no_hold_of_python(template: str) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RowRefused, match="template"):
        render(tokenizer, copy.deepcopy(TURNS))


@pytest.fixture(scope="module")
def word_tokenizer() -> Any:
    """Words alone: no token has the white space between them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(text=st.text("ab .A\néﬁ字🙂▁", min_size=1, max_size=20), cuts=st.sets(st.integers(0, 20), max_size=6))
def test_a_token_is_learned_where_any_of_its_characters_is(
    text: str, cuts: set[int], tokenizer: Any, sentencepiece: Any, word_tokenizer: Any
) -> None:
    ends = sorted(cut for cut in cuts if cut <= len(text))
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    for made in (tokenizer, sentencepiece, word_tokenizer, plain_tokenizer()):
        tokens = made(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
        assert tokenized(made, [text], [spans]) == [(ids, labels_of(ids, offsets, spans))]
