"""Messages as people have them become messages as the chat API has them."""

import json
from typing import Any

import pytest
from spectraqlora.data.conversations import Cell, messages_of, text_of, tools_of
from spectraqlora.data.files import Number
from spectraqlora.data.rows import Origin
from spectraqlora.errors import InputError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def cell(value: Any) -> Cell:
    return Cell(Origin("d.jsonl", 7), "messages", value)


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        json.dumps(CHAT),
        f" {json.dumps(CHAT, indent=2)}\n",
        str(CHAT),
        {"role": ["user", "assistant"], "content": ["q", "a"]},
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"role": "Human", "content": "q"}, {"role": "model", "content": "a"}],
        {"from": ["human", "gpt"], "value": ["q", "a"], "weight": [None, None]},
        [
            {"role": "user", "content": "q", "name": None},
            {"role": "assistant", "content": "a", "tool_calls": None},
        ],
        [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": ["a"]},
        ],
        [
            {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "a", "image_url": None}]},
        ],
    ],
)
def test_every_form_of_a_list_of_messages_is_the_same(value: Any) -> None:
    assert messages_of(cell(value)) == CHAT


@pytest.mark.parametrize("value", [None, "", [], "[]"])
def test_nothing_is_no_messages(value: Any) -> None:
    assert messages_of(cell(value)) == []


@pytest.mark.parametrize(
    "value",
    [
        "hello",
        "[1, 2]",
        ["a", "b"],
        [{"content": "no role"}],
        [{"role": "user", "from": "gpt", "value": "both"}],
        [{"role": "", "content": "x"}],
        {"role": ["user"], "content": []},
        3,
        [{"role": "user", "content": True}],
        [{"role": "user", "content": {"text": "x"}}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}],
        [{"role": "assistant", "content": "a", "weight": "heavy"}],
        [{"role": "assistant", "content": "a", "train": "perhaps"}],
    ],
)
def test_anything_else_is_refused_with_file_row_and_column(value: Any) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl, row 7, messages") as refused:
        messages_of(cell(value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "function_call", "value": '[{"name": "weather", "parameters": {"city": "Rome"}}]'},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
    ],
)  # fmt: skip
def test_tool_calls_in_any_form_are_openais_with_parsed_arguments(message: dict[str, Any]) -> None:
    assert messages_of(cell([message])) == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_ids_names_and_results_of_tools_stay() -> None:
    call = {"id": "1", **CALL}
    messages = [
        {"role": "assistant", "content": "x", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "sunny"},
        {"from": "observation", "value": "rain"},
        {"role": "function", "name": "f", "content": "1"},
    ]
    assert messages_of(cell(messages)) == [
        messages[0],
        messages[1],
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "1", "name": "f"},
    ]


def test_gaps_of_declared_types_are_no_arguments_but_what_json_says_is() -> None:
    calls = [{"function": {"name": "f", "arguments": {"a": None, "b": {"c": None, "d": 1}}}}]
    message = [{"role": "assistant", "content": "", "tool_calls": calls}]
    native = messages_of(cell(message), native=True)[0]["tool_calls"][0]["function"]["arguments"]
    written = messages_of(cell(message))[0]["tool_calls"][0]["function"]["arguments"]
    assert native == {"b": {"d": 1}}
    assert written == {"a": None, "b": {"c": None, "d": 1}}


def test_numbers_of_arguments_and_tools_are_numbers_and_those_of_text_are_text() -> None:
    messages = [
        {"role": "user", "content": Number("1.50")},
        {
            "role": "assistant",
            "tool_calls": [{"name": "f", "arguments": {"n": Number("3"), "x": [Number("1.5")]}}],
        },
    ]
    read = messages_of(cell(messages))
    assert read[0]["content"] == "1.50" and type(read[0]["content"]) is str
    assert read[1]["tool_calls"][0]["function"]["arguments"] == {"n": 3, "x": [1.5]}
    tools = tools_of(cell([{"name": "f", "parameters": {"minimum": Number("0")}}]))
    assert tools == [{"type": "function", "function": {"name": "f", "parameters": {"minimum": 0}}}]


def test_thinking_is_its_own_wherever_it_stands() -> None:
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    for message in (
        thought,
        {"role": "assistant", "content": "a", "reasoning": "hm"},
        {"role": "assistant", "content": "a", "thinking": "hm"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}],
        },
    ):
        assert messages_of(cell([message])) == [thought]


def test_weights_and_train_marks_stay_and_a_blank_answer_is_never_learned() -> None:
    messages = [
        {"role": "assistant", "content": "a", "weight": Number("0")},
        {"role": "assistant", "content": "a", "weight": 1.0},
        {"role": "assistant", "content": "a", "train": False},
        {"from": "gpt", "value": "a", "loss": True},
        {"role": "assistant", "content": " "},
    ]
    marks = [{k: m[k] for k in m if k in ("weight", "train")} for m in messages_of(cell(messages))]
    assert marks == [{"weight": 0}, {"weight": 1.0}, {"train": False}, {"train": True}, {"train": False}]


def test_other_roles_stay_for_the_template_to_decide() -> None:
    roles = ["system", "developer", "critic"]
    assert [m["role"] for m in messages_of(cell([{"role": r, "content": "x"} for r in roles]))] == roles


@pytest.mark.parametrize("value", [None, "", [], "[]"])
def test_no_tools_are_none(value: Any) -> None:
    assert tools_of(cell(value)) is None


@pytest.mark.parametrize("value", ["weather", [3], {"name": "f"}, ["no json"]])
def test_tools_are_a_list_of_objects(value: Any) -> None:
    with pytest.raises(InputError, match="tools"):
        tools_of(cell(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), (Number("1.50"), "1.50"), (3, "3"), (0, "0"), (1.5, "1.5"), ("", ""), (None, None)],
)
def test_text_is_text_or_a_plain_number(value: Any, text: str | None) -> None:
    assert text_of(cell(value)) == text


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), ["a"], {"a": 1}, b"bytes"])
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="text or a plain number"):
        text_of(cell(value))
