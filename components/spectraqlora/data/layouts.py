"""Row layouts: which columns a row has, and what each of them is to the model.

| columns | a row is |
| --- | --- |
| `messages`, `conversations` or `conversation` | a conversation; `system` and `tools` (or `functions`) belong to it |
| one of `prompt`, `instruction`, `question`, `query`, `input` with one of `completion`, `response`, `output`, `answer`, `answers` | a prompt and its answer, each as text or as messages; `input` or `context` follows the prompt; `system` and `history` (pairs of prompt and answer) go before it |
| `chosen` and `rejected` | a preference: with `data.preference=chosen`, what was chosen |
| `text` | plain text |

`label` or `kto_tag` (true or false, 1 or 0) next to a prompt or messages marks good and bad rows: with `data.preference=chosen`
the good ones are learned from. Where nothing fits, `data.columns` says which column is what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectraqlora.data.conversations import (
    Cell,
    is_messages,
    messages_of,
    text_of,
    tools_of,
)
from spectraqlora.data.rows import Conversation, Message, Origin, PromptCompletion, Row, RowRefused, Text
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
COMPLETIONS = ("completion", "response", "output", "answer", "answers")
TOOLS = ("tools", "functions")
LABELS = ("label", "kto_tag")
PICTURES = ("image", "images", "audio", "audios", "video", "videos")
MARKED_BAD = "marked as bad"
"""The reason of rows whose label says so."""
_MARKS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_EXTRA = ("input", "context")
_GUESSED_PROMPTS = (*PROMPTS, "user", "human", "problem", "task", "request", "source", "title")
_GUESSED_COMPLETIONS = (*COMPLETIONS, "assistant", "solution", "reply", "target", "gpt", "result", "text")


@dataclass(frozen=True)
class Layout:
    """What the columns of a row are.

    Args:
        name: what manifests call it.
        columns: a row's column by its part: messages, prompt, completion, text, system, tools, history, extra (which
            follows the prompt), chosen, label.
        native: whether the file declares its types.
        pictures: columns of images, audio or video.
    """

    name: str
    columns: Mapping[str, str]
    native: bool = False
    pictures: tuple[str, ...] = ()

    def row(self, record: Mapping[str, Any], origin: Origin) -> Row:
        """A record as the row that it is.

        Raises:
            RowRefused: there is nothing to learn from.
            InputError: a value is none of text, a plain number and messages; or there are images or audio.
        """
        cells = {part: Cell(origin, name, record.get(name)) for part, name in self.columns.items()}
        for name in self.pictures:
            if record.get(name):
                raise InputError(
                    f"{origin}, {name}",
                    "images, audio or video",
                    "text alone; leave the column out to learn from text",
                )
        if "label" in cells and not _good(cells["label"]):
            raise RowRefused(MARKED_BAD)
        if "chosen" in cells:
            return self._chosen(cells, origin)
        if "messages" in cells:
            return self._conversation(messages_of(cells["messages"], self.native), cells, origin)
        if "text" in cells:
            text = text_of(cells["text"]) or ""
            if not text.strip():
                raise RowRefused("no text")
            return Text(text, origin)
        return self._pair(cells["prompt"], cells["completion"], cells, origin)

    def _chosen(self, cells: Mapping[str, Cell], origin: Origin) -> Row:
        chosen = cells["chosen"]
        if isinstance(chosen.value, Mapping) and ("role" in chosen.value or "from" in chosen.value):
            chosen = Cell(origin, chosen.column, [chosen.value])
        if "messages" in cells:
            before = messages_of(cells["messages"], self.native)
            return self._conversation([*before, *messages_of(chosen, self.native)], cells, origin)
        if "prompt" not in cells:
            if is_messages(chosen.value):
                return self._conversation(messages_of(chosen, self.native), cells, origin)
            text = text_of(chosen) or ""
            if not text.strip():
                raise RowRefused("no text")
            return Text(text, origin)
        if is_messages(chosen.value):
            answer = messages_of(chosen, self.native)
            # Often the prompt is in it already.
            if any(message["role"] == "user" for message in answer):
                return self._conversation(answer, cells, origin)
        return self._pair(cells["prompt"], chosen, cells, origin)

    def _pair(self, prompt: Cell, completion: Cell, cells: Mapping[str, Cell], origin: Origin) -> Row:
        if isinstance(completion.value, (list, Mapping)) and not is_messages(completion.value):
            completion = _first_answer(completion)
        spoken = [is_messages(cell.value) for cell in (prompt, completion)]
        # Text that happens to be a list of messages is one only where the other is one, too.
        written = [isinstance(cell.value, str) for cell in (prompt, completion)]
        if any(said and not text for said, text in zip(spoken, written, strict=True)) or all(spoken):
            messages = self._spoken(prompt, "user") + self._spoken(completion, "assistant")
            return self._conversation(messages, cells, origin)
        asked, answered = text_of(prompt) or "", text_of(completion) or ""
        if "extra" in cells:
            extra = (text_of(cells["extra"]) or "").strip()
            asked += f"\n{extra}" if extra else ""
        if not asked.strip():
            raise RowRefused("no prompt")
        if not answered.strip():
            raise RowRefused("no answer")
        history = _history(cells["history"]) if "history" in cells else []
        system = text_of(cells["system"]) if "system" in cells else None
        tools = tools_of(cells["tools"], self.native) if "tools" in cells else None
        if not history and not (system or "").strip() and not tools:
            return PromptCompletion(asked, answered, origin)
        last = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return self._conversation([*history, *last], cells, origin)

    def _spoken(self, cell: Cell, role: str) -> list[Message]:
        if is_messages(cell.value):
            return messages_of(cell, self.native)
        text = text_of(cell) or ""
        return [{"role": role, "content": text}] if text.strip() else []

    def _conversation(
        self, messages: list[Message], cells: Mapping[str, Cell], origin: Origin
    ) -> Conversation:
        if not messages:
            raise RowRefused("no messages")
        system = text_of(cells["system"]) if "system" in cells else None
        if (system or "").strip() and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        answers = [m for m in messages if m["role"] == "assistant"]
        if not any(m["content"].strip() or m.get("tool_calls") for m in answers):
            raise RowRefused("no answer")
        return Conversation(
            messages, tools_of(cells["tools"], self.native) if "tools" in cells else None, origin
        )


class Layouts:
    """The layouts of one file's rows, which may differ in the columns that they leave out.

    Args:
        settings: the `data` section.
        name: of the file, for errors.
        native: whether the file declares its types.
    """

    def __init__(self, settings: DataSettings, name: str, native: bool = False) -> None:
        self._settings, self._name, self._native = settings, name, native
        self._known: dict[tuple[str, ...], Layout] = {}
        self._latest: Layout | None = None

    def of(self, record: Mapping[str, Any]) -> Layout:
        """The layout of a record: by the columns in which it has something, else by all, else its file's.

        Raises:
            InputError: the first record of a file fits none.
        """
        filled = tuple(name for name, value in record.items() if value is not None and value != "")
        if filled not in self._known:
            self._known[filled] = self._find(filled, tuple(record))
        self._latest = self._known[filled]
        return self._latest

    def _find(self, filled: tuple[str, ...], names: tuple[str, ...]) -> Layout:
        for columns in (filled, names):
            found = _fitting(columns, names, self._settings, self._native, self._name)
            if found is not None:
                return found
        if self._latest is not None:
            return self._latest
        raise unknown_columns(self._name, names)


def known_columns(settings: DataSettings) -> set[str]:
    """All columns that a header may be known by."""
    known = {*MESSAGES, *PROMPTS, *COMPLETIONS, "text", "chosen", "rejected"}
    return set(settings.columns.values()) or known


def _fitting(
    filled: Sequence[str], names: Sequence[str], settings: DataSettings, native: bool, source: str
) -> Layout | None:
    there = set(filled)
    pictures = tuple(name for name in PICTURES if name in names)
    if settings.columns:
        named = {part: name for part, name in settings.columns.items() if name in names}
        wanted = {part for part in settings.columns if part in ("messages", "prompt", "completion", "text")}
        if not wanted <= named.keys():
            return None
        if "input" in named:
            named["extra"] = named.pop("input")
        return Layout(_name(named), named, native, pictures)
    beside = {"system": "system", "history": "history"} if "history" in there else {"system": "system"}
    beside = {part: name for part, name in beside.items() if name in names}
    tools = _first(TOOLS, there)
    if tools:
        beside["tools"] = tools
    if {"chosen", "rejected"} <= there:
        if settings.preference != "chosen":
            raise InputError(
                f"{source}, columns",
                "chosen, rejected",
                "answers, not preferences; data.preference=chosen learns what was chosen",
            )
        columns = {"chosen": "chosen", **beside}
        messages, prompt = _first(MESSAGES, there), _first(PROMPTS, there)
        if messages:
            columns["messages"] = messages
        elif prompt:
            columns["prompt"] = prompt
            beside_prompt = _first(tuple(n for n in _EXTRA if n != prompt), there)
            columns |= {"extra": beside_prompt} if beside_prompt else {}
        return Layout("preference", columns, native, pictures)
    label = _first(LABELS, there)
    labelled = {"label": label} if label and settings.preference == "chosen" else {}
    messages = _first(MESSAGES, there)
    if messages:
        name = "sharegpt" if messages == "conversations" else "chat"
        return Layout(name, {"messages": messages, **beside, **labelled}, native, pictures)
    prompt, completion = _first(PROMPTS, there), _first(COMPLETIONS, there)
    if prompt and completion:
        columns = {"prompt": prompt, "completion": completion, **beside, **labelled}
        # Where it is empty in this row, another's is not.
        extra = _first(tuple(name for name in _EXTRA if name != prompt), set(names))
        columns |= {"extra": extra} if extra else {}
        return Layout(_name(columns), columns, native, pictures)
    if "text" in there:
        return Layout("text", {"text": "text"}, native, pictures)
    return None


def _name(columns: Mapping[str, str]) -> str:
    if "messages" in columns:
        return "chat"
    if "text" in columns:
        return "text"
    pair = (columns["prompt"], columns["completion"])
    if pair == ("instruction", "output"):
        return "alpaca"
    if pair == ("instruction", "response") and columns.get("extra") == "context":
        return "dolly"
    return f"{pair[0]}-{pair[1]}"


def check_label(record: Mapping[str, Any], layout: Layout, settings: DataSettings, origin: Origin) -> None:
    """Refuse rows marked good or bad where `data.preference` does not say what to learn of them.

    Raises:
        InputError: they are marked.
    """
    if settings.preference == "chosen" or settings.columns or layout.name == "text":
        return
    for name in LABELS:
        if str(record.get(name)).lower() in _MARKS:
            raise InputError(
                f"{origin}, {name}",
                record[name],
                "rows without marks of good and bad; data.preference=chosen learns from the good ones, and "
                "data.columns says that such a column is something else",
            )


def unknown_columns(name: str, columns: Iterable[str]) -> InputError:
    """The refusal of columns that fit no layout, with the setting that would name them filled in."""
    names = [column for column in columns if column]
    lower = {column.lower().strip(): column for column in reversed(names)}
    prompt = _guess(_GUESSED_PROMPTS, lower) or (names[0] if names else "COLUMN")
    others = {key: value for key, value in lower.items() if value != prompt}
    completion = _guess(_GUESSED_COMPLETIONS, others)
    messages = _guess(("dialog", "dialogue", "chat", *MESSAGES), lower)
    if messages:
        hint = f"messages: {messages}"
    elif completion is None and len(names) < 2:
        hint = f"text: {prompt}"
    else:
        completion = completion or next((column for column in names if column != prompt), "COLUMN")
        hint = f"prompt: {prompt}, completion: {completion}"
    return InputError(
        f"{name}, columns",
        ", ".join(names),
        f"messages, a prompt and an answer, or text; --set 'data.columns={{{hint}}}' says which column is what",
    )


def _guess(known: Sequence[str], lower: Mapping[str, str]) -> str | None:
    return next((lower[name] for name in known if name in lower), None)


def _first(names: Sequence[str], there: Iterable[str]) -> str | None:
    present = set(there)
    return next((name for name in names if name in present), None)


def _good(cell: Cell) -> bool:
    value = str(cell.value).lower()
    if value not in _MARKS:
        raise cell.refusal("true or false: a good row or a bad one")
    return _MARKS[value]


def _first_answer(cell: Cell) -> Cell:
    """The first of several answers to choose from, as question-answering data has them: a list, or {"text": list}."""
    value = cell.value
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = value["text"]
    if not isinstance(value, list) or not all(v is None or isinstance(v, str) for v in value):
        raise cell.refusal("text, a plain number, or a list of messages")
    return Cell(cell.origin, cell.column, value[0] if value else None)


def _history(cell: Cell) -> list[Message]:
    """Alpaca's earlier turns: a list of pairs of prompt and answer."""
    if cell.value is None or cell.value == "":
        return []
    expected = "a list of pairs of prompt and answer"
    if not isinstance(cell.value, list):
        raise cell.refusal(expected)
    messages: list[Message] = []
    for index, pair in enumerate(cell.value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise cell.refusal(expected, pair)
        at = f"{cell.column}[{index}]"
        asked, answered = (text_of(Cell(cell.origin, at, value)) or "" for value in pair)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages
