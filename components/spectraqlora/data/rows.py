"""What a row is once it is read: the one shape that rendering takes, whatever file and layout it came from.

Reading hands `Row`s to `Renderer.render(row) -> RenderedRow`, and to `Renderer.question(row)`. What cannot be rendered
or learned from raises `RowRefused`: prepare-data drops the row and counts it under the reason, the checks before a
run name the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One message as OpenAI's chat API has it.

| key | value |
| --- | --- |
| `role` | str: system, developer, user, assistant, tool, or what else a file calls it, for the template to decide |
| `content` | str; text parts are joined, and what was null beside tool calls is "" |
| `tool_calls` | only where there are any: [{"id"?: str, "type": "function", "function": {"name": str, "arguments": dict}}], the arguments parsed where they were JSON text of an object |
| `tool_call_id`, `name`, `reasoning_content` | str, only where given |
| `weight` | number, only where given: 0 leaves the turn without labels |
| `train` | bool, only where given: false leaves the turn without labels |

`weight` and `train` are no part of what the template sees.
"""


@dataclass(frozen=True)
class Origin:
    """Where a row came from, for errors.

    Args:
        file: path or address of the file, or hub id and split.
        number: the row's, counted from 1; in a file of lines, the line's.
        source: place of its source among `data.sources`.
    """

    file: str
    number: int
    source: int = 0

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, not empty; the assistant has at least one.

    Args:
        messages: in order; see `Message`.
        tools: as the file has them, [{"type": "function", "function": {…}}]; None where there are none.
        origin: of the row.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    origin: Origin


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its answer, as plain text; neither is blank.

    Where the model has a chat template they are a user's and an assistant's message.
    """

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True)
class Text:
    """Plain text of which every token is learned; not blank."""

    text: str
    origin: Origin


Row = Conversation | PromptCompletion | Text


class RowRefused(Exception):
    """A row that is not learned from.

    Args:
        reason: short and the same for all rows of its kind, such as "no answer" or "the template refuses it"; rows are
            counted by it.
        detail: of this row, such as the template's own words; may be empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)
