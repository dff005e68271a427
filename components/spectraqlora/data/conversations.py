"""Messages as people have them, as OpenAI's chat API has them: what `Message` says.

| in a file | becomes |
| --- | --- |
| `role`, `from` | `role`: human, user, prompter are user; gpt, bot, model, chatbot, ai are assistant; observation, function, function_response, ipython are tool; function_call is the assistant's, with `tool_calls`; every other stays |
| `content`, `value` | `content`: text, or a plain number; text parts joined |
| `tool_calls`, `function_call` | `tool_calls`, the arguments parsed |
| `reasoning_content`, `reasoning`, `thinking`, parts of the type thinking | `reasoning_content` |
| `weight`; `train`, `loss` | `weight`; `train` |

A list of messages is a list, JSON text of one, a mapping of columns of lists as `datasets` stores sequences, or
Python's text of one as pandas writes it into CSV. An assistant's message that is blank and calls no tool is never
learned (`train` false).
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from spectraqlora.data.files import Number
from spectraqlora.data.rows import Message, Origin
from spectraqlora.errors import InputError

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "chatbot", "ai", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("chatgpt", "bing", "bard"), "assistant"),  # as ShareGPT's rows have them
    **dict.fromkeys(("observation", "function", "function_response", "ipython", "tool"), "tool"),
}
"""Roles by their synonyms, in lower case."""
_PLAIN_ROLES = {"system", "user", "assistant"}
_TEXT_PARTS = {"text", "input_text", "output_text"}
_THINKING_PARTS = {"thinking", "reasoning"}
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Cell:
    """One value of a row, and what an error calls it."""

    origin: Origin
    column: str
    value: Any

    def refusal(self, expected: str, value: object = None) -> InputError:
        """The error that this value is not what was expected."""
        shown = self.value if value is None else value
        return InputError(f"{self.origin}, {self.column}", str(shown)[:120], expected)


def text_of(cell: Cell) -> str | None:
    """A string as it is, a plain number as it is written; None where there is nothing.

    Raises:
        InputError: it is anything else.
    """
    value = cell.value
    if value is None or type(value) is str:
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise cell.refusal("text or a plain number")


def is_messages(value: Any) -> bool:
    """Whether a prompt or an answer is a list of messages instead of text."""
    return _as_list(value) is not None


def messages_of(cell: Cell, native: bool = False) -> list[Message]:
    """The messages of a list in any of its forms; empty where there is nothing.

    Args:
        cell: the list.
        native: whether the file declares its types, so that a key without a value is a gap of its columns.

    Raises:
        InputError: it is no list of messages.
    """
    if cell.value is None or cell.value == "":
        return []
    listed = _as_list(cell.value)
    if listed is None:
        raise cell.refusal("a list of messages, each with role and content")
    return [
        _plain_message(message) or _message(Cell(cell.origin, f"{cell.column}[{index}]", message), native)
        for index, message in enumerate(listed)
    ]


def _plain_message(message: Mapping[str, Any]) -> Message | None:
    """One of a known role's with text and nothing else, as most are; None for all others, which take longer."""
    role, content = message.get("role"), message.get("content")
    if len(message) != 2 or type(role) is not str or type(content) is not str or role not in _PLAIN_ROLES:
        return None
    blank = role == "assistant" and not content.strip()
    return None if blank else {"role": role, "content": content}


def tools_of(cell: Cell, native: bool = False) -> list[dict[str, Any]] | None:
    """Descriptions of tools, each {"type": "function", "function": {…}}; None where there are none.

    Raises:
        InputError: they are no list of objects.
    """
    value = cell.value
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
        if value is None and cell.value.strip():
            raise cell.refusal("a list of tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, (dict, str)) for tool in value):
        raise cell.refusal("a list of tools")
    tools = []
    for tool in value:
        described = _parsed(tool) if isinstance(tool, str) else tool
        if not isinstance(described, dict):
            raise cell.refusal("a list of tools", tool)
        plain = _plain(described, native)
        tools.append(plain if "function" in plain else {"type": "function", "function": plain})
    return tools


def _as_list(value: Any) -> list[Any] | None:
    """The list of objects that a value is; None where it is none."""
    if isinstance(value, str):
        stripped = value.strip()
        value = _parsed(stripped) if stripped[:1] == "[" else None
    if isinstance(value, Mapping):
        # Columns of lists, as `datasets` stores a sequence of structs.
        if not value or not all(isinstance(column, list) for column in value.values()):
            return None
        if len({len(column) for column in value.values()}) > 1:
            return None
        value = [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        return None
    return value if all(_keys(entry) for entry in value) else None


def _keys(message: Mapping[str, Any]) -> bool:
    return ("role" in message or "from" in message) and not ("role" in message and "from" in message)


def _parsed(text: str) -> Any:
    """What JSON text, or Python's text of a literal, says; None where it is neither."""
    try:
        return json.loads(text, parse_int=Number, parse_float=Number)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _message(cell: Cell, native: bool) -> Message:
    given = {key: value for key, value in cell.value.items() if value is not None}
    role = text_of(Cell(cell.origin, f"{cell.column}.role", given.get("role", given.get("from")))) or ""
    if not role.strip():
        raise cell.refusal("a role")
    message: Message = {"role": ROLES.get(role.strip().lower(), role.strip())}
    content, thinking = _content(
        Cell(cell.origin, f"{cell.column}.content", given.get("content", given.get("value")))
    )
    message["content"] = content
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    thought = text_of(Cell(cell.origin, f"{cell.column}.reasoning_content", reasoning)) or thinking
    if thought:
        message["reasoning_content"] = thought
    calls = _tool_calls(cell, given, native)
    if role.strip().lower() == "function_call" and not calls:
        calls = _called_in_text(cell, content, native)
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if key in given:
            message[key] = text_of(Cell(cell.origin, f"{cell.column}.{key}", given[key]))
    if "weight" in given:
        message["weight"] = _weight(cell, given["weight"])
    for key in ("train", "loss"):
        if key in given:
            message["train"] = _flag(Cell(cell.origin, f"{cell.column}.{key}", given[key]))
    if message["role"] == "assistant" and not message["content"].strip() and not calls:
        message["train"] = False
    return message


def _content(cell: Cell) -> tuple[str, str]:
    """(text, thinking) of a content: text as it is, or parts."""
    if not isinstance(cell.value, list):
        return text_of(cell) or "", ""
    text, thinking = [], []
    for index, part in enumerate(cell.value):
        at = Cell(cell.origin, f"{cell.column}[{index}]", part)
        if isinstance(part, Mapping):
            kind = str(part.get("type") or ("text" if part.get("text") is not None else ""))
            if kind in _THINKING_PARTS:
                thinking.append(_part_text(at, ("thinking", "reasoning", "text", "content")))
            elif kind in _TEXT_PARTS:
                text.append(_part_text(at, ("text", "content")))
            else:
                raise at.refusal("text; images, audio and other parts are not learned from", kind or part)
        else:
            text.append(text_of(at) or "")
    return "".join(text), "".join(thinking)


def _part_text(cell: Cell, keys: tuple[str, ...]) -> str:
    value = next((cell.value[key] for key in keys if cell.value.get(key) is not None), None)
    return text_of(Cell(cell.origin, cell.column, value)) or ""


def _tool_calls(cell: Cell, given: Mapping[str, Any], native: bool) -> list[dict[str, Any]]:
    calls = given.get("tool_calls")
    if calls is None and "function_call" in given:
        calls = [given["function_call"]]
    if isinstance(calls, str):
        text, calls = calls, _parsed(calls) if calls.strip() else []
        if calls is None and text.strip() not in ("null", "None"):
            raise cell.refusal("a list of tool calls", text)
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise cell.refusal("a list of tool calls", calls)
    return [_tool_call(cell, call, native) for call in calls]


def _tool_call(cell: Cell, call: Any, native: bool) -> dict[str, Any]:
    """{"id"?, "type": "function", "function": {"name", "arguments"}} of a call in any of its forms."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise cell.refusal("tool calls with a function's name", call)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        parsed = _json_object(arguments)
        arguments = arguments if parsed is None else parsed
    arguments = {} if arguments is None else _plain(arguments, native)
    result: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if call.get("id") is not None:
        result = {"id": str(call["id"]), **result}
    return result


def _called_in_text(cell: Cell, content: str, native: bool) -> list[dict[str, Any]]:
    """The calls that ShareGPT's function_call has as JSON text: one object, or a list of them."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise cell.refusal("a function_call as JSON with name and arguments", content) from None
    return [_tool_call(cell, call, native) for call in (value if isinstance(value, list) else [value])]


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _plain(value: Any, native: bool) -> Any:
    """Numbers as numbers; of a file that declares its types, without what is a gap of its columns."""
    if isinstance(value, Number):
        return value.plain()
    if isinstance(value, Mapping):
        return {k: _plain(v, native) for k, v in value.items() if not (native and v is None)}
    if isinstance(value, list):
        return [_plain(entry, native) for entry in value]
    return value


def _weight(cell: Cell, value: Any) -> int | float:
    if isinstance(value, Number):
        value = value.plain()
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise cell.refusal("a weight of 0 or more", value)
    return value


def _flag(cell: Cell) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    value = str(cell.value).lower()
    if value not in known:
        raise cell.refusal("true or false")
    return known[value]
