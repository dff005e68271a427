"""Which layout a row has, and what it becomes."""

import json
from typing import Any

import pytest
from spectraqlora.data.layouts import Layout, Layouts, check_label
from spectraqlora.data.rows import Conversation, Origin, PromptCompletion, Row, RowRefused, Text
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings

AT = Origin("d.jsonl", 3)
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [ASKED, ANSWERED]
TOOL = {"type": "function", "function": {"name": "f"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}  # fmt: skip


def layout_of(record: Any) -> Layout:
    return Layouts(DataSettings(), "data").of(dict.fromkeys(record, "x"))


def read(record: dict[str, Any], **settings: Any) -> Row:
    return Layouts(DataSettings(**settings), "d.jsonl").of(record).row(record, AT)


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt-completion"),
        ({"prompt": "q", "response": "a"}, "prompt-response"),
        ({"question": "q", "answer": "a", "id": 1}, "question-answer"),
        ({"query": "q", "answers": "a"}, "query-answers"),
        ({"query": "q", "answers": ["a", "other"]}, "query-answers"),
        ({"question": "q", "answers": {"text": ["a"], "answer_start": [3]}}, "question-answers"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "q", "output": "a", "system": "", "history": []}, "alpaca"),
        ({"instruction": "q", "response": "a"}, "instruction-response"),
        ({"instruction": "q", "context": None, "response": "a", "category": "x"}, "dolly"),
        ({"input": "q", "output": "a"}, "input-output"),
    ],
)
def test_prompts_and_answers_of_every_name(record: dict[str, Any], layout: str) -> None:
    assert Layouts(DataSettings(), "d").of(record).name == layout
    assert read(record) == PromptCompletion("q", "a", AT)


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        ({"messages": CHAT}, "chat"),
        ({"messages": json.dumps(CHAT), "prompt": "q", "completion": "a"}, "chat"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "chat"),
        ({"conversation": CHAT}, "chat"),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, "chat"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt-completion"),
        ({"prompt": json.dumps([ASKED]), "completion": json.dumps([ANSWERED])}, "prompt-completion"),
        ({"prompt": [ASKED], "completion": "a"}, "prompt-completion"),
        ({"prompt": "q", "completion": [ANSWERED]}, "prompt-completion"),
    ],
)
def test_conversations_of_every_form(record: dict[str, Any], layout: str) -> None:
    assert Layouts(DataSettings(), "d").of(record).name == layout
    assert read(record) == Conversation(CHAT, None, AT)


def test_text_is_text_and_a_prompt_that_only_looks_like_messages_stays_text() -> None:
    assert read({"text": " a\n"}) == Text(" a\n", AT)
    listed = json.dumps([ASKED])
    assert read({"prompt": "As JSON?", "completion": listed}) == PromptCompletion("As JSON?", listed, AT)


def test_system_history_and_tools_belong_to_the_conversation() -> None:
    system = {"role": "system", "content": "s"}
    assert read({"messages": CHAT, "system": "s"}) == Conversation([system, *CHAT], None, AT)
    assert read({"messages": [system, *CHAT], "system": "t"}) == Conversation([system, *CHAT], None, AT)
    alpaca = {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["h", "i"]]}
    earlier = [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}]
    assert read(alpaca) == Conversation([system, *earlier, *CHAT], None, AT)
    for name in ("tools", "functions"):
        assert read({"messages": [ASKED, CALLED], name: [{"name": "f"}]}) == Conversation(
            [ASKED, CALLED], [TOOL], AT
        )
    assert read({"messages": [ASKED, CALLED], "tools": json.dumps([TOOL])}) == Conversation(
        [ASKED, CALLED], [TOOL], AT
    )


@pytest.mark.parametrize("extra", ["input", "context"])
def test_input_and_context_follow_the_prompt(extra: str) -> None:
    record = {"instruction": "add", extra: " 1, 2 ", "response": 3}
    assert read(record) == PromptCompletion("add\n1, 2", "3", AT)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": None}, "no messages"),
        ({"messages": []}, "no messages"),
        ({"messages": CHAT[:1]}, "no answer"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "no answer"),
        ({"question": "q", "answer": None}, "no answer"),
        ({"question": " ", "answer": "a"}, "no prompt"),
        ({"prompt": None, "completion": "a"}, "no prompt"),
        ({"instruction": "q", "output": ""}, "no answer"),
        ({"query": "q", "answers": []}, "no answer"),
        ({"prompt": [ASKED], "completion": []}, "no answer"),
        ({"text": " \n"}, "no text"),
    ],
)
def test_rows_without_something_to_learn_say_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowRefused) as refused:
        read(record)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("record", "column"),
    [
        ({"prompt": "q", "completion": True}, "completion"),
        ({"prompt": {"a": 1}, "completion": "a"}, "prompt"),
        ({"text": ["a"]}, "text"),
        ({"prompt": "q", "completion": ["a", 3]}, "completion"),
        ({"messages": "hello"}, "messages"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "history"),
        ({"messages": CHAT, "images": ["x.png"]}, "images"),
        ({"prompt": "q", "completion": "a", "audio": {"path": "x.wav"}}, "audio"),
    ],
)
def test_what_is_no_text_is_refused_with_file_row_and_column(record: dict[str, Any], column: str) -> None:
    with pytest.raises(InputError, match=rf"d\.jsonl, row 3, {column}") as refused:
        read(record)
    assert "\n" not in str(refused.value)


def test_empty_pictures_do_no_harm() -> None:
    assert read({"messages": CHAT, "images": []}) == Conversation(CHAT, None, AT)


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (["Question", "Answer"], "{prompt: Question, completion: Answer}"),
        (["id", "user_text", "bot_text"], "{prompt: id, completion: user_text}"),
        (["Problem", "score", "Solution"], "{prompt: Problem, completion: Solution}"),
        (["dialogue", "id"], "{messages: dialogue}"),
        (["content"], "{text: content}"),
    ],
)
def test_unknown_columns_are_refused_with_the_setting_filled_in(columns: list[str], hint: str) -> None:
    with pytest.raises(InputError) as refused:
        layout_of(columns)
    assert f"--set 'data.columns={hint}'" in str(refused.value)


def test_the_setting_names_columns() -> None:
    record = {"Question": "q", "Answer": "a", "Hint": "h", "About": "s", "prompt": "other"}
    columns = {"prompt": "Question", "completion": "Answer"}
    assert read(record, columns=columns) == PromptCompletion("q", "a", AT)
    more = read(record, columns={**columns, "input": "Hint", "system": "About"})
    assert more == Conversation(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q\nh"}, ANSWERED], None, AT
    )
    assert read({"chat": CHAT}, columns={"messages": "chat"}) == Conversation(CHAT, None, AT)
    assert read({"body": "x"}, columns={"text": "body"}) == Text("x", AT)
    with pytest.raises(InputError, match="Question"):
        read(record, columns={"prompt": "Frage", "completion": "Antwort"})


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "a"},
        {"reply": "a"},
        {"prompt": "a", "completion": ""},
        {"text": "a", "messages": "b"},
        {"system": "a"},
    ],
)
def test_a_setting_that_names_no_layout_is_refused(columns: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="messages, or prompt and completion, or text"):
        DataSettings(columns=columns)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED]},
        {"chosen": CHAT, "rejected": CHAT},
        {"prompt": "q", "chosen": CHAT, "rejected": CHAT},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
    ],
)  # fmt: skip
def test_preferences_are_refused_or_what_was_chosen_is_learned(record: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"data\.preference=chosen"):
        read(record)
    row = read(record, preference="chosen")
    pair = isinstance(row, PromptCompletion)
    assert row == (PromptCompletion("q", "a", AT) if pair else Conversation(CHAT, None, AT))


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_rows_marked_good_or_bad_are_refused_or_the_good_ones_are_learned(name: str) -> None:
    for mark in (True, False, "true", "False", 1, 0, "0", 1.0):
        record = {"messages": CHAT, name: mark}
        layout = layout_of(record)
        with pytest.raises(InputError, match=rf"row 3, {name}.*data\.preference=chosen"):
            check_label(record, layout, DataSettings(), AT)
    assert read({"messages": CHAT, name: True}, preference="chosen") == Conversation(CHAT, None, AT)
    with pytest.raises(RowRefused, match="marked as bad"):
        read({"messages": CHAT, name: False}, preference="chosen")


def test_a_class_label_next_to_text_is_no_mark() -> None:
    record = {"text": "a film", "label": True}
    check_label(record, layout_of(record), DataSettings(), AT)
    named = {"prompt": "q", "completion": "a", "label": "greeting"}
    check_label(named, layout_of(named), DataSettings(), AT)
    columns = {"prompt": "prompt", "completion": "completion"}
    check_label({**named, "label": 1}, layout_of(named), DataSettings(columns=columns), AT)


def test_rows_of_one_file_may_leave_columns_out() -> None:
    layouts = Layouts(DataSettings(), "d.jsonl")
    records = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q"},
        {"messages": CHAT},
        {"messages": None, "prompt": "q", "completion": "a"},
        {"messages": CHAT, "prompt": None, "completion": None},
    ]
    kinds = []
    for record in records:
        try:
            kinds.append(type(layouts.of(record).row(record, AT)).__name__)
        except RowRefused as refused:
            kinds.append(refused.reason)
    assert kinds == ["PromptCompletion", "no answer", "Conversation", "PromptCompletion", "Conversation"]
