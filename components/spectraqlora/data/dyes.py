"""Where each message stands in a rendered conversation, whatever its template did to it.

The conversation is rendered twice: as it is, and with every letter of every message's own text replaced by one
character that stands for that message. White space, quotes and texts that the template may look for stay, so the
template does the same to both; where both renderings have equal lengths and are equal everywhere but at the replaced
letters, these say which character comes from which message. Otherwise nothing is known, and nothing is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from spectraqlora.data.chat_template import ChatTemplate
from spectraqlora.data.rows import Message, RowRefused

_ALPHABETS = ((0x17000, 0x187F8), (0x20000, 0x2A6E0))
"""Tangut, then rare Chinese: letters without case that Python's and JSON's notation leave as they are."""
_FIELDS = 4
_TEXT, _REASONING, _ARGUMENTS, _NAME = range(_FIELDS)
LETTERS = r"""[^\s"'\\\x00-\x1f\x7f]"""
_LINES = rf"(?<=\S)[ \t](?=\S)|{LETTERS}"
WORDS = r"[^\W_]"
"""What is replaced: letters and the space between two of them, which makes runs long; letters; or words alone, where a template writes other signs in a way of its own, such as HTML's."""
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Run:
    """Characters in a row that come from one field of one message.

    Args:
        start: first character.
        end: behind the last one.
        message: its place in the conversation.
        field: text, reasoning, a call's arguments or its name.
    """

    start: int
    end: int
    message: int
    field: int

    @property
    def is_name(self) -> bool:
        """Whether it is a called function's name, which templates may repeat where its result stands."""
        return self.field == _NAME


@dataclass(frozen=True)
class Dyed:
    """A conversation with its letters replaced.

    Args:
        messages: that conversation.
        text: its rendering, as long as the plain one.
        runs: in order.
        first: the alphabet's first letter.
        visible: which fields of which messages have letters to be found, as (message, field).
        constants: texts that the template may look for, and that are in the messages.
    """

    messages: list[Message]
    text: str
    runs: list[Run]
    visible: frozenset[tuple[int, int]]
    constants: frozenset[str]
    _pattern: re.Pattern[str]
    _first: int

    def runs_of(self, text: str) -> list[Run]:
        """Of another rendering of these messages, or of some of them."""
        return _runs(text, self._pattern, self._first)

    def has_words(self, message: int) -> bool:
        """Whether anything of a message can be found."""
        return any(place == message for place, _ in self.visible)

    def calls_of(self, message: int) -> bool:
        """Whether a call's name or arguments can be found of a message."""
        return {(message, _ARGUMENTS), (message, _NAME)} & self.visible != set()

    def shows(self, message: int, *fields: int) -> bool:
        """Whether any of the fields, by default any at all, is in the rendering."""
        return any(run.message == message and (not fields or run.field in fields) for run in self.runs)

    def shows_calls(self, message: int) -> bool:
        """Whether a call's name or arguments are in the rendering."""
        return self.shows(message, _ARGUMENTS, _NAME)

    def loses(self, message: int, reasoning: bool = False) -> bool:
        """Whether a message's own text, or its reasoning, is not in the rendering."""
        field = _REASONING if reasoning else _TEXT
        return (message, field) in self.visible and not self.shows(message, field)


def dyed(
    template: ChatTemplate, messages: list[Message], tools: list[dict[str, Any]] | None, text: str
) -> Dyed | None:
    """Where each message stands in `text`, the rendering of `messages`; None where that cannot be said for sure."""
    alphabet = next(
        (
            (first, stop)
            for first, stop in _ALPHABETS
            if len(messages) * _FIELDS <= stop - first and not _letters(first, stop).search(text)
        ),
        None,
    )
    if alphabet is None:
        return None
    first, stop = alphabet
    pattern = _letters(first, stop)
    constants, marked = looked_for(template.constants(tools))
    ways = [(marked, _LINES), (constants, LETTERS), (marked, WORDS), ((), LETTERS)]
    for kept, letters in dict.fromkeys(ways):
        visible: set[tuple[int, int]] = set()
        present: set[str] = set()
        other = [
            _dye(message, index, first, (kept, letters), visible, present)
            for index, message in enumerate(messages)
        ]
        try:
            rendered = template.text(other, tools)
        except RowRefused:
            continue
        runs = _runs(rendered, pattern, first)
        if _equal_elsewhere(text, rendered, runs):
            return Dyed(other, rendered, runs, frozenset(visible), frozenset(present), pattern, first)
    return None


@lru_cache
def _letters(first: int, stop: int) -> re.Pattern[str]:
    """Finds runs of one letter of an alphabet."""
    return re.compile(rf"([{chr(first)}-{chr(stop - 1)}])\1*")


@lru_cache
def looked_for(texts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of a template's constants those that may matter in a message, and those of these that are more than a word."""
    constants = tuple(text for text in texts if len(text) > 1)
    return constants, tuple(text for text in constants if not text.isalnum() and not text.isspace())


def _runs(text: str, pattern: re.Pattern[str], first: int) -> list[Run]:
    return [
        Run(match.start(), match.end(), *divmod(ord(match.group(1)) - first, _FIELDS))
        for match in pattern.finditer(text)
    ]


def _equal_elsewhere(text: str, other: str, runs: list[Run]) -> bool:
    if len(text) != len(other):
        return False
    place = 0
    for run in runs:
        if text[place : run.start] != other[place : run.start]:
            return False
        place = run.end
    return text[place:] == other[place:]


def _dye(
    message: Message,
    index: int,
    first: int,
    way: tuple[tuple[str, ...], str],
    visible: set[tuple[int, int]],
    present: set[str],
) -> Message:
    def colour(field: int) -> Callable[[Any], Any]:
        letter = chr(first + index * _FIELDS + field)

        def text(value: str) -> str:
            result = _replaced(value, letter, *way, present)
            if letter in result:
                visible.add((index, field))
            return result

        def nested(value: Any) -> Any:
            if isinstance(value, str):
                return text(value)
            if isinstance(value, list):
                return [nested(item) for item in value]
            if isinstance(value, dict):
                # A part of a content says its kind.
                return {k: v if k == "type" and field == _TEXT else nested(v) for k, v in value.items()}
            return value

        return nested

    result = dict(message)
    for key, field in (("content", _TEXT), *((key, _REASONING) for key in REASONING)):
        if result.get(key) is not None:
            result[key] = colour(field)(result[key])
    if isinstance(message.get("tool_calls"), list):
        result["tool_calls"] = [_dyed_call(call, colour) for call in message["tool_calls"]]
    return result


def _dyed_call(call: Any, colour: Callable[[int], Callable[[Any], Any]]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    changed = dict(function)
    if isinstance(function.get("name"), str):
        changed["name"] = colour(_NAME)(function["name"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # JSON's own signs stay, for templates that look at them.
        pieces = re.split(r"([{}\[\]:,])", arguments)
        changed["arguments"] = "".join(
            piece if index % 2 else colour(_ARGUMENTS)(piece) for index, piece in enumerate(pieces)
        )
    elif arguments is not None:
        changed["arguments"] = colour(_ARGUMENTS)(arguments)
    return {**call, "function": changed}


def _replaced(text: str, letter: str, kept: tuple[str, ...], letters: str, seen: set[str]) -> str:
    present = [constant for constant in kept if constant in text]
    seen.update(present)
    if not present:
        return re.sub(letters, letter, text)
    pieces = re.split(f"({'|'.join(map(re.escape, present))})", text)
    return "".join(
        piece if index % 2 else re.sub(letters, letter, piece) for index, piece in enumerate(pieces)
    )
