"""Rows of every layout as messages."""

from typing import Any

import pytest
from spectraqlora.data.conversations import messages_of
from spectraqlora.data.layouts import recognise

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"messages": CHAT}, "chat"),
        ({"prompt": "q", "completion": "a"}, "prompt-completion"),
        ({"question": "q", "answer": "a", "id": 1}, "question-answer"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
    ],
)
def test_layouts_become_the_same_messages(row: dict[str, Any], layout: Any) -> None:
    assert recognise(row) == layout
    assert messages_of(layout, row) == CHAT


def test_alpacas_input_follows_its_instruction() -> None:
    row = {"instruction": "add", "input": " 1, 2 ", "output": 3}
    assert [m["content"] for m in messages_of("alpaca", row)] == ["add\n1, 2", "3"]


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("chat", {"messages": None}),
        ("chat", {"messages": []}),
        ("chat", {"messages": CHAT[:1]}),
        ("chat", {"messages": [CHAT[0], {"role": "assistant", "content": " "}]}),
        ("question-answer", {"question": "q", "answer": None}),
        ("question-answer", {"question": " ", "answer": "a"}),
        ("prompt-completion", {"prompt": None, "completion": "a"}),
        ("alpaca", {"instruction": "q", "output": ""}),
    ],
)
def test_a_row_without_an_answer_or_a_question_is_empty(layout: Any, row: dict[str, Any]) -> None:
    assert messages_of(layout, row) == []


def test_a_number_is_an_answer_zero_too() -> None:
    assert messages_of("question-answer", {"question": "q", "answer": 0})[-1]["content"] == "0"
