"""What a template writes around messages: the same for all conversations of one shape, so that it is found once.

Of a conversation whose learned characters are known, the text around its messages is remembered, and where in it
learned characters begin and end. The next one of its shape is rendered once: where its text is the same around its
own messages, so is what is learned.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from spectraqlora.data.dyes import LETTERS, WORDS, Dyed
from spectraqlora.data.rows import Message

Span = tuple[int, int]
Place = tuple[int, int]
"""A character of the text around messages: which piece it is in, and how far from its beginning."""
_KEYS = {"role", "content", "weight", "train"}
_OTHERS = LETTERS.replace("[^", "[")
_ENDS = re.compile(rf"({_OTHERS}*)(?={LETTERS}).*{LETTERS}({_OTHERS}*)", re.DOTALL)
_WORD = re.compile(WORDS)


def shape_of(messages: Sequence[Message], constants: Sequence[str]) -> Hashable | None:
    """All that a template can go by in messages, but for their words; None where one is more than plain text.

    Args:
        messages: of a conversation without tools.
        constants: texts that the template may look for; a message that has one is not plain.
    """
    shape = []
    for message in messages:
        content = message.get("content")
        if type(content) is not str or not message.keys() <= _KEYS or not _WORD.search(content):
            return None
        ends = _ENDS.fullmatch(content)
        if not ends or any(constant in content for constant in constants):
            return None
        shape.append((message["role"], *ends.groups(), message.get("weight"), message.get("train")))
    return tuple(shape)


@dataclass(frozen=True)
class Form:
    """The text around the messages of a shape, and what is learned.

    Args:
        pieces: before, between and behind the messages' contents.
        ends: where learned characters begin and end.
    """

    pieces: tuple[str, ...]
    ends: tuple[tuple[Place, Place], ...]

    @classmethod
    def of(cls, text: str, spans: Sequence[Span], messages: Sequence[Message], dyes: Dyed) -> Form | None:
        """Of a conversation whose learned characters are known.

        None where its messages do not stand in the text as they are and in order, or one is learned in part.
        """
        pieces, place = [], 0
        for index, message in enumerate(messages):
            run = next((run for run in dyes.runs if run.message == index), None)
            if run is None:
                return None
            start = run.start - dyes.messages[index]["content"].index(dyes.text[run.start])
            if start < place or not text.startswith(message["content"], start):
                return None
            pieces.append(text[place:start])
            place = start + len(message["content"])
        pieces.append(text[place:])
        starts = _starts(_parts(pieces, messages))
        places = {
            start + offset: (piece, offset)
            for piece, start in enumerate(starts)
            for offset in range(len(pieces[piece]) + 1)
        }
        if not all(end in places for span in spans for end in span):
            return None
        return cls(tuple(pieces), tuple((places[first], places[stop]) for first, stop in spans))

    def spans(self, text: str, messages: Sequence[Message]) -> list[Span] | None:
        """What is learned of another conversation of the shape; None where its text has another form."""
        parts = _parts(self.pieces, messages)
        if "".join(parts) != text:
            return None
        starts = _starts(parts)
        return [(starts[a] + first, starts[b] + stop) for (a, first), (b, stop) in self.ends]


def _parts(pieces: Sequence[str], messages: Sequence[Message]) -> list[str]:
    contents = [*(message["content"] for message in messages), ""]
    return [part for pair in zip(pieces, contents, strict=True) for part in pair]


def _starts(parts: Sequence[str]) -> list[int]:
    """Where each piece begins in the text."""
    return list(itertools.accumulate(map(len, parts), initial=0))[:-1:2]
