"""Conversations as every family's template renders them: the ids are its own, and the answers are learned, all of them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spectraqlora.artifacts import IGNORED
from spectraqlora.data import turns
from spectraqlora.data.chat_template import ChatTemplate
from spectraqlora.data.rendering import RenderedRow, render
from spectraqlora.data.rows import RowRefused

from tests.chat_templates import FAMILIES, TEMPLATES, tokenizer_of

MOMENT = datetime(2026, 1, 2, 3, 4, 5)
WORDS = st.text(alphabet="abcxyz01 \n\té字🙂\"'{}<|:.,/\\", max_size=24)
ANSWERS = WORDS.filter(lambda text: any(c.isalnum() for c in text))
QUIET = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> list[dict[str, Any]]:
    messages = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(ANSWERS)})
    for _ in range(draw(st.integers(1, 3))):
        messages += [
            {"role": "user", "content": draw(WORDS)},
            {"role": "assistant", "content": draw(ANSWERS)},
        ]
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(WORDS)})
    return messages


def shown(row: RenderedRow) -> list[str]:
    return [row.text[start:end] for start, end in row.spans]


def own_ids(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """What transformers gives, at the date of the row's own rendering."""
    from spectraqlora.data import chat_template

    with chat_template._at(MOMENT):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=True)["input_ids"]


def rendered(name: str, messages: list[dict[str, Any]], tools: Any = None, **more: Any) -> RenderedRow:
    tokenizer = tokenizer_of(name)
    return render(tokenizer, messages, tools, template=ChatTemplate(tokenizer, MOMENT), **more)


def test_every_template_is_of_a_known_family() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)
    assert len(FAMILIES) >= 25


@pytest.mark.parametrize("name", FAMILIES)
@QUIET
@given(data=st.data())
def test_ids_are_the_templates_and_labels_the_answers(name: str, data: st.DataObject) -> None:
    family = FAMILIES[name]
    messages = data.draw(conversations(system=family.system == "own"))
    row = rendered(name, messages)
    assert row.input_ids == own_ids(tokenizer_of(name), messages)
    answers = [
        family.answer(message["content"], place == len(messages) - 1)
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    assert shown(row) == answers
    assert row.turns == len(answers)
    learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    assert learned == [label for label in row.labels if label != IGNORED]
    decoded = tokenizer_of(name).decode(learned)
    for answer in answers:
        assert answer in decoded


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def calling(arguments: Any, name: str = "weather") -> list[dict[str, Any]]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": "abcdefghi", "name": name},
        {"role": "assistant", "content": "It is sunny."},
    ]


CALLS = {
    "llama_3_tools": '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
    "mistral_v3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "abcdefghi"}]</s>',
    "qwen_25": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
    "qwen_3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
    "deepseek_v3": '<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>weather\n```json\n{"city": "Rome"}\n```'
    "<|tool_call_end|><|tool_calls_end|></s>",
    "granite": '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]<|end_of_text|>',
    "gpt_oss": ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
}


OFFERED: dict[str, None] = {"deepseek_v3": None}
"""It writes calls and results, and no tools."""


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'], ids=["object", "text"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_learned_as_the_template_writes_them_and_results_are_not(name: str, arguments: Any) -> None:
    row = rendered(name, calling(arguments), OFFERED.get(name, TOOLS))
    call, answer = shown(row)
    assert call == CALLS[name] or call == "\n" + CALLS[name]
    assert "It is sunny." in answer
    assert "sky" not in call + answer
    as_read = calling({"city": "Rome"} if name != "deepseek_v3" else '{"city": "Rome"}')
    assert row.input_ids == own_ids(tokenizer_of(name), as_read, OFFERED.get(name, TOOLS))


@pytest.mark.parametrize("arguments", [{}, {"x": 3}], ids=["none", "a number"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_words_in_its_arguments_is_learned_whole(name: str, arguments: Any) -> None:
    call, _ = shown(rendered(name, calling(arguments), OFFERED.get(name, TOOLS)))
    whole = CALLS[name].replace('{"city": "Rome"}', '{"x": 3}' if arguments else "{}")
    assert call == whole or call == "\n" + whole


@st.composite
def errands(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Conversations in which some answers are found by calling, once or several times in a row."""
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(ANSWERS)})
        for _ in range(draw(st.integers(0, 2))):
            _, call, result, _ = calling({"city": draw(ANSWERS), "days": draw(st.integers(0, 9))})
            messages += [call, {**result, "content": draw(ANSWERS)}]
        messages.append({"role": "assistant", "content": draw(ANSWERS)})
    return messages


@pytest.mark.parametrize("name", sorted(set(CALLS) - set(OFFERED)))
@settings(QUIET, max_examples=12)
@given(messages=errands())
def test_every_call_and_answer_is_learned_and_nothing_of_the_results(
    name: str, messages: list[dict[str, Any]]
) -> None:
    row = rendered(name, messages, TOOLS)
    assert row.input_ids == own_ids(tokenizer_of(name), messages, TOOLS)
    spoken = [message for message in messages if message["role"] == "assistant"]
    assert row.turns == len(spoken) == len(row.spans)
    family = FAMILIES[name]
    for place, (message, learned) in enumerate(zip(spoken, shown(row), strict=True)):
        if "tool_calls" in message:
            city = json.dumps(message["tool_calls"][0]["function"]["arguments"]["city"], ensure_ascii=False)
            assert city in learned and learned.count("weather") == 1
            assert learned.endswith(CALLS[name].rpartition('"Rome"}')[2])
        else:
            answer = family.answer(message["content"], place == len(spoken) - 1)
            assert learned in (answer, family.answer(message["content"], False))


def test_two_calls_in_one_turn_are_learned() -> None:
    messages = calling({"city": "Rome"})
    messages[1]["tool_calls"] = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for city in ("Rome", "Oslo")
    ]
    call, _ = shown(rendered("qwen_25", messages, TOOLS))
    assert call.count("<tool_call>") == call.count("</tool_call>") == 2
    assert call.endswith('"Oslo"}}\n</tool_call><|im_end|>')


@pytest.mark.parametrize("name", sorted((set(FAMILIES) - set(CALLS)) | set(OFFERED)))
def test_a_template_without_tools_refuses_rows_with_tools(name: str) -> None:
    with pytest.raises(RowRefused, match=r"no tools|no tool calls|refuses it|leaves out the role"):
        rendered(name, calling({"city": "Rome"}), TOOLS)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.system == "refused"])
def test_a_template_that_refuses_a_role_refuses_the_row_in_its_words(name: str) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    with pytest.raises(RowRefused, match=r"the template refuses it: .*(not supported|alternate)") as refusal:
        rendered(name, messages)
    assert refusal.value.reason == "the template refuses it"


def test_a_message_that_the_template_leaves_out_is_counted() -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    assert rendered("phi_4", messages).left_out == {"developer messages": 1}
    assert "Be short." in rendered("gpt_oss", messages).text


THINKING = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1", "reasoning_content": "counting up"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2", "reasoning_content": "counting on"},
]
INLINE = [
    {"role": m["role"], "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
    if "reasoning_content" in m
    else m
    for m in THINKING
]


def test_thinking_is_learned_where_it_is_written_and_counted_where_it_is_not() -> None:
    row = rendered("qwen_3", THINKING)
    assert shown(row) == ["1<|im_end|>", "<think>\ncounting on\n</think>\n\n2<|im_end|>"]
    assert row.left_out == {"reasoning": 1}
    assert row.input_ids == own_ids(tokenizer_of("qwen_3"), THINKING)
    assert shown(rendered("qwen_3", INLINE)) == shown(row)
    assert shown(rendered("qwen_3_thinking", THINKING)) == [
        "1<|im_end|>",
        "counting on\n</think>\n\n2<|im_end|>",
    ], "the prompt opens the thought"
    assert shown(rendered("deepseek_r1", INLINE)) == ["\n\n1</s>", "\n\n2</s>"]
    assert shown(rendered("gpt_oss", THINKING)) == [
        "<|channel|>final<|message|>1<|end|>",
        "<|channel|>analysis<|message|>counting on<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>",
    ]
    assert rendered("chatml", THINKING).left_out == {"reasoning": 2}


def test_a_mode_in_the_system_message_moves_where_the_model_takes_over() -> None:
    messages = [{"role": "system", "content": "/no_think"}, *THINKING]
    row = rendered("smollm_3", messages)
    assert row.text.count("<think>\n\n</think>\n") == 2
    assert shown(row) == ["1<|im_end|>", "2<|im_end|>"], "its prompt holds the empty thought"


TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "BAD", "weight": 0},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "good", "weight": 1},
    {"role": "user", "content": "thanks"},
]


@pytest.mark.parametrize("name", ["chatml", "chatml_generation", "llama_3", "mistral_v3", "gemma_3"])
def test_a_turn_of_weight_zero_or_train_false_is_read_and_not_learned(name: str) -> None:
    for off in ({"weight": 0}, {"weight": 0.0}, {"train": False}):
        messages = [TURNS[0], {"role": "assistant", "content": "BAD", **off}, *TURNS[2:]]
        row = rendered(name, messages)
        assert "BAD" in row.text
        assert shown(row) == [FAMILIES[name].answer("good", False)]
        assert (row.turns, row.unlearned) == (1, {"weight 0 or train: false": 1})
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in TURNS]
    assert row.input_ids == own_ids(tokenizer_of(name), plain)


def test_a_weight_that_says_neither_refuses_the_row() -> None:
    with pytest.raises(RowRefused, match=r"a weight other than 0 and 1: 0\.5"):
        rendered("chatml", [TURNS[0], {"role": "assistant", "content": "x", "weight": 0.5}])


def test_what_is_trained_on() -> None:
    assert shown(rendered("chatml", THINKING, train_on="last")) == ["2<|im_end|>"]
    assert rendered("chatml", THINKING, train_on="last").unlearned == {"data.train_on=last": 1}
    everything = rendered("chatml", THINKING, train_on="all")
    assert everything.labels == everything.input_ids
    but_one = rendered("chatml", TURNS, train_on="all")
    assert "".join(shown(but_one)) == but_one.text.replace("BAD<|im_end|>", "")
    with pytest.raises(RowRefused, match="no turn is learned: weight 0"):
        rendered("chatml", TURNS[:2])
    with pytest.raises(RowRefused, match="no answer"):
        rendered("chatml", TURNS[:1])


def test_what_the_template_says_is_generated_is_what_transformers_takes_for_it() -> None:
    tokenizer = tokenizer_of("chatml_generation")
    made = tokenizer.apply_chat_template(
        THINKING, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    row = render(tokenizer, THINKING)
    assert [int(label != IGNORED) for label in row.labels] == made["assistant_masks"]


def test_a_first_turn_of_the_assistants_is_learned_where_the_template_takes_it() -> None:
    messages = [{"role": "assistant", "content": "Hello!"}, *THINKING[:2]]
    for name in (
        "chatml",
        "llama_3",
        "phi_4",
        "zephyr",
        "gpt_oss",
        "deepseek_v2",
        "vicuna",
        "chatml_no_prompt",
    ):
        assert shown(rendered(name, messages))[0] == FAMILIES[name].answer("Hello!", False), name
    with pytest.raises(RowRefused, match="alternate"):
        rendered("gemma_2", messages)


def test_dates_are_the_same_in_all_renderings() -> None:
    for name in ("llama_3_tools", "granite", "gpt_oss"):
        tokenizer = tokenizer_of(name)
        row = render(tokenizer, THINKING)
        assert shown(row) == [
            FAMILIES[name].answer("1", False),
            shown(row)[1],
        ], "microseconds pass between renderings"


def test_an_empty_answer_is_not_learned() -> None:
    empty = {"role": "assistant", "content": " \n"}
    row = rendered("chatml", [TURNS[0], empty, *TURNS[2:4]])
    assert (shown(row), row.unlearned) == (["good<|im_end|>"], {"no answer": 1})
    off = rendered("chatml", [TURNS[0], {**empty, "train": False}, *TURNS[2:4]])
    assert off.unlearned == {"no answer": 1}, "as reading marks it"
    for name in ("chatml", "llama_3"):
        with pytest.raises(RowRefused, match=r"^no answer$"):
            rendered(name, [TURNS[0], empty])


DROPPING = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REVEALING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>user\nYou said: {{ messages[1].content }}<|im_end|>\n"
)
GREEDY = "{% generation %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{% endgeneration %}"
FICKLE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | replace('1', 'one') }}<|im_end|>{% endfor %}"


def with_template(template: str) -> Any:
    import copy

    tokenizer = copy.copy(tokenizer_of("chatml"))
    tokenizer.chat_template = template
    return tokenizer


ESCAPING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | e }}<|im_end|>\n{% endfor %}"
LOWERING = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}\n{{ m.content | lower }}<|im_end|>\n{% endfor %}"
)


def test_a_template_may_write_signs_and_letters_in_its_own_way() -> None:
    messages = [{"role": "user", "content": "a<b?"}, {"role": "assistant", "content": "<b>Yes</b> & no"}]
    assert shown(render(with_template(ESCAPING), messages)) == ["&lt;b&gt;Yes&lt;/b&gt; &amp; no<|im_end|>"]
    assert shown(render(with_template(LOWERING), messages)) == ["<b>yes</b> & no<|im_end|>"]
    titled = LOWERING.replace("lower", "title")
    assert shown(render(with_template(titled), messages)) == ["<B>yes</b> & No<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (
            "{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content.strip() + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}",
            ["1\n", "2\n"],
        ),
        (
            "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
            ["1\n\n", "2\n\n"],
        ),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", ["1\n", "2\n"]),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}",
            ["1", "2\n<|endoftext|>"],
        ),
        (
            "{% for m in messages %}{{ '<|end|>' + m.role + m.content }}{% endfor %}<|end|>",
            ["1<|end|>", "2<|end|>"],
        ),
        ("{% for m in messages %}{{ m | tojson + '\n' }}{% endfor %}", ['1"}', '2"}']),
    ],
    ids=["a line ends", "two lines end", "no prompt", "one end for all", "one token on both sides", "json"],
)
def test_an_answer_ends_as_its_template_ends_it(template: str, learned: list[str]) -> None:
    messages = [{"role": m["role"], "content": m["content"]} for m in THINKING]
    assert shown(render(with_template(template), messages)) == learned


@pytest.mark.parametrize("name", ["llama_4", "gemma_3"])
def test_contents_in_parts_are_learned(name: str) -> None:
    messages = [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in THINKING
    ]
    assert shown(rendered(name, messages)) == [FAMILIES[name].answer(text, False) for text in "12"]


def test_an_earlier_turn_that_the_template_drops_is_counted() -> None:
    row = render(with_template(DROPPING), THINKING)
    assert (shown(row), row.unlearned) == (["2<|im_end|>"], {"the template leaves it out": 1})


@pytest.mark.parametrize("template", [REVEALING, GREEDY, FICKLE])
def test_a_template_that_cannot_be_masked_safely_refuses_the_row(template: str) -> None:
    with pytest.raises(RowRefused, match="the template cannot be masked safely"):
        render(with_template(template), THINKING)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.end])
def test_the_token_that_ends_a_turn_is_the_templates(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert tokenizer.convert_ids_to_tokens(ChatTemplate(tokenizer).turn_end) == FAMILIES[name].end


@pytest.mark.parametrize("name", ["falcon", "baichuan"])
def test_a_template_that_ends_no_turn_has_no_such_token(name: str) -> None:
    assert ChatTemplate(tokenizer_of(name)).turn_end is None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_an_answer_is_what_precedes_it_in_training(name: str) -> None:
    messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
    row = rendered(name, messages)
    before = row.text[: row.spans[0][0]]
    prompt = ChatTemplate(tokenizer_of(name), MOMENT).prompt(messages[:1])
    assert prompt == before or prompt in (before + "<think>\n",)


@st.composite
def alike(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """Conversations of few shapes: of most there are several."""
    turns = st.sampled_from(
        [("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2]
    )
    said = st.one_of(st.text("abx y", min_size=1, max_size=8), ANSWERS)
    roles = draw(st.lists(turns, min_size=6, max_size=6))
    return [[{"role": role, "content": draw(said)} for role in spoken] for spoken in roles]


@pytest.mark.parametrize("name", FAMILIES)
@settings(QUIET, max_examples=6)
@given(rows=alike())
def test_what_was_seen_before_changes_nothing(name: str, rows: list[list[dict[str, Any]]]) -> None:
    tokenizer = tokenizer_of(name)
    seen = ChatTemplate(tokenizer, MOMENT)

    def outcome(template: ChatTemplate, messages: list[dict[str, Any]], train_on: Any) -> object:
        try:
            return turns.learned(template, messages, None, train_on)
        except RowRefused as refused:
            return refused.args

    for messages in rows:
        for train_on in ("assistant", "all", "last"):
            alone = outcome(ChatTemplate(tokenizer, MOMENT), messages, train_on)
            assert outcome(seen, messages, train_on) == alone


def test_a_template_writes_once_for_conversations_of_a_known_shape() -> None:
    class Counted(ChatTemplate):
        written = 0

        def text(self, *given: Any, **named: Any) -> str:
            self.written += 1
            return super().text(*given, **named)

    template = Counted(tokenizer_of("llama_3"), MOMENT)
    rows = [
        [*TURNS[:1], {"role": "assistant", "content": answer}] for answer in ("Yes.", "No, never.", "Yes\n")
    ]
    counts = []
    for messages in rows:
        before = template.written
        row = render(template.tokenizer, messages, template=template)
        assert shown(row) == [FAMILIES["llama_3"].answer(messages[1]["content"], True)]
        counts.append(template.written - before)
    assert counts[0] > 1 and counts[1] == 1 and counts[2] > 1, "what is trimmed has another shape"
