"""A model's chat template: what it writes, always on the same date, and what can be said of it from a probe."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Hashable, Iterator
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from spectraqlora.data.rows import Message, RowRefused
from spectraqlora.models.families import replaced

_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_PROBE_PROMPT, _PROBE_ANSWER, _PROBE_TOOL = "亖亖", "亗亗", "probe_tool"
"""Of a conversation that stands for all: letters without case, which few write."""
UNSEEN = ("weight", "train")
"""Keys of a message that say whether it is learned, and are no part of what the template sees."""


class ChatTemplate:
    """Renders conversations as `tokenizer.apply_chat_template` does.

    Args:
        tokenizer: one with a chat template.
        moment: what the template's date functions say, in every rendering; now where it is not given.
    """

    def __init__(self, tokenizer: Any, moment: datetime | None = None) -> None:
        self.tokenizer = tokenizer
        self.moment = moment or datetime.now()
        self.tails: dict[Hashable, str] = {}
        """By what precedes an answer, what the prompt for it ends with: the same for many conversations."""
        self.forms: dict[Hashable, Any] = {}
        """By the shape of a conversation, what is written around its messages, and what is learned."""

    def text(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, prompt: bool = False
    ) -> str:
        """The conversation as text.

        Args:
            messages: as the template sees them.
            tools: functions in JSON schema, or None.
            prompt: whether the beginning of an answer follows.

        Raises:
            RowRefused: the template raises; the detail holds its words.
        """
        with _refusing(), _at(self.moment):
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt
                )
            )

    def generated(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character spans inside `{% generation %}`.

        Raises:
            RowRefused: the template raises.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{key: value for key, value in m.items() if value is not None} for m in messages]
        with _refusing(), _at(self.moment):
            texts, spans = render_jinja_template(
                [given],
                tools=tools,
                chat_template=self.source(tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """What a model reads before it answers `messages`: the template's own prompt.

        Where the template heeds no `add_generation_prompt` but begins answers with a header, that header follows.

        Raises:
            RowRefused: the template raises.
        """
        return self.text(messages, tools, prompt=True) + self.header.rstrip(" ")

    def source(self, tools: list[dict[str, Any]] | None = None) -> str:
        """The Jinja text; of several templates the one for conversations with or without tools."""
        return str(self.tokenizer.get_chat_template(tools=tools))

    def marks_answers(self, tools: list[dict[str, Any]] | None = None) -> bool:
        """Whether it says itself what the assistant generates, by `{% generation %}`."""
        return bool(_GENERATION.search(self.source(tools)))

    def constants(self, tools: list[dict[str, Any]] | None = None) -> tuple[str, ...]:
        """Texts in the template's expressions, which it may compare a message's content with."""
        return _constants(self.source(tools))

    def in_its_form(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[Message], str]:
        """Messages as the template reads them, and what it writes.

        Some templates write a call's arguments as JSON, others expect JSON text; arguments are given as the former
        reads them unless the template raises, or would write Python's representation of them.

        Raises:
            RowRefused: the template raises.
        """
        seen = [{key: value for key, value in m.items() if key not in UNSEEN} for m in messages]
        given = [call["function"].get("arguments") for m in seen for call in _calls(m)]
        if not given:
            return seen, self.text(seen, tools)
        objects = _with_arguments(seen, _parsed)
        try:
            text = self.text(objects, tools)
        except RowRefused as refusal:
            error = refusal
        else:
            forms = [form for form in map(_parsed, given) if isinstance(form, dict) and form]
            if not any(str(form) in text and _json(form) not in text for form in forms):
                return objects, text
            error = RowRefused("the template refuses it", "it writes a call's arguments as Python's text")
        texts = _with_arguments(seen, _json)
        try:
            return texts, self.text(texts, tools)
        except RowRefused:
            raise error from None

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Finds the tokenizer's special tokens in a text."""
        return special_tokens(self.tokenizer)

    @cached_property
    def end(self) -> str:
        """What the template writes to end an answer, up to its first special token; empty where it writes nothing.

        White space that follows other text is none of it.
        """
        rest = self._after_answer
        token = self.special.search(rest)
        if token:
            return rest[: token.end()]
        return rest.rstrip() or rest

    @cached_property
    def sample(self) -> str:
        """A question and an answer as it writes them; empty where it takes none."""
        return self._probe([_PROBE_PROMPT, _PROBE_ANSWER])

    @property
    def renders(self) -> bool:
        """Whether it takes a question and an answer."""
        return _PROBE_ANSWER in self.sample

    @property
    def opener(self) -> str:
        """The special token that begins an assistant's message; empty where none does."""
        token = self.special.search(self.opening)
        return token.group() if token else ""

    @cached_property
    def openers(self) -> frozenset[str]:
        """Special tokens that begin messages, as far as a user's and an assistant's show them."""
        asked = self._probe([_PROBE_PROMPT])
        before, prompt, after = asked.partition(_PROBE_PROMPT)
        if not prompt:
            return frozenset()
        names = self.special.findall(before) + self.special.findall(self.opening)
        return frozenset(names) - set(self.special.findall(after)) - set(self.special.findall(self.end))

    @cached_property
    def opening(self) -> str:
        """What `add_generation_prompt` adds to a user's message."""
        asked, open_ended = self._probe([_PROBE_PROMPT]), self._probe([_PROBE_PROMPT], prompt=True)
        return open_ended.removeprefix(asked) if open_ended.startswith(asked) else ""

    @cached_property
    def header(self) -> str:
        """What begins an answer in a template that heeds no `add_generation_prompt`; empty where that heeds it."""
        if self.opening:
            return ""
        asked = self._probe([_PROBE_PROMPT], prompt=True)
        before, answer, _ = self.sample.rpartition(_PROBE_ANSWER)
        if not asked or not answer or not before.startswith(asked):
            return ""
        rest = before[len(asked) :]
        return rest if rest.strip() else ""

    @cached_property
    def turn_end(self) -> int | None:
        """The token by which an answer ends; None where no single token does."""
        token = self.special.search(self.end)
        if token:
            return int(self.tokenizer.convert_tokens_to_ids(token.group()))
        ids = self.tokenizer(self.end.strip(), add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 and ids[0] in self.tokenizer.added_tokens_decoder else None

    @cached_property
    def writes_tools(self) -> bool:
        """Whether it writes the functions that a conversation offers."""
        function = {
            "name": _PROBE_TOOL,
            "description": "Probe.",
            "parameters": {"type": "object", "properties": {}},
        }
        tools = [{"type": "function", "function": function}]
        return _PROBE_TOOL in self._probe([_PROBE_PROMPT], tools=tools)

    @cached_property
    def _after_answer(self) -> str:
        _, answer, after = self.sample.rpartition(_PROBE_ANSWER)
        return after if answer else ""

    def _probe(
        self, contents: list[str], prompt: bool = False, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """A short conversation as text, with a system message where there must be one; empty where it is refused."""
        turns: list[Message] = [
            {"role": role, "content": content}
            for role, content in zip(("user", "assistant"), contents, strict=False)
        ]
        for messages in (turns, [{"role": "system", "content": "Probe."}, *turns]):
            with contextlib.suppress(RowRefused):
                return self.text(messages, tools, prompt)
        return ""


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds a tokenizer's special tokens in a text, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


class _Clock:
    """Stands in for `datetime` where templates ask for the date."""

    def __init__(self, moment: datetime) -> None:
        self._moment = moment

    def now(self, tz: Any = None) -> datetime:
        return self._moment if tz is None else self._moment.astimezone(tz)


@contextlib.contextmanager
def _at(moment: datetime) -> Iterator[None]:
    from transformers.utils import chat_template_utils

    with replaced(chat_template_utils, "datetime", _Clock(moment)):
        yield


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What a template raises, which may be anything that Jinja's expressions raise, refuses the row."""
    try:
        yield
    except Exception as error:
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise RowRefused("the template refuses it", first) from None


@lru_cache
def _constants(source: str) -> tuple[str, ...]:
    import jinja2
    from jinja2 import nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION.sub("", source))
    except jinja2.TemplateError:
        return ()
    values = {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def _calls(message: Message) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    return [call for call in calls if isinstance(call, dict) and isinstance(call.get("function"), dict)]


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_arguments(messages: list[Message], form: Any) -> list[Message]:
    """The messages, with every call's arguments in another form."""
    result = []
    for message in messages:
        if calls := _calls(message):
            changed = [
                {**call, "function": {**call["function"], "arguments": form(call["function"]["arguments"])}}
                if "arguments" in call["function"]
                else call
                for call in calls
            ]
            message = {**message, "tool_calls": changed}
        result.append(message)
    return result
