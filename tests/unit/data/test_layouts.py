"""Which layout a data set has."""

import pytest
from spectraqlora.data.layouts import COLUMNS, recognise
from spectraqlora.errors import InputError


@pytest.mark.parametrize("layout", COLUMNS)
def test_a_layout_is_known_by_its_columns_whatever_else_is_there(layout: str) -> None:
    assert recognise(["id", *COLUMNS[layout], "source"]) == layout  # type: ignore[index]


def test_messages_win_over_a_prompt_next_to_them() -> None:
    assert recognise(["prompt", "completion", "messages"]) == "chat"


def test_unknown_columns_list_what_was_found_and_what_is_known() -> None:
    with pytest.raises(InputError, match=r"foo.*question-answer"):
        recognise(["foo", "bar"])
