"""Rows as token ids and labels: with the model's chat template where it has one, else with `data.prompt_template`.

The README in this folder says what is learned of what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from spectraqlora.artifacts import IGNORED
from spectraqlora.data.chat_template import UNSEEN, ChatTemplate, special_tokens
from spectraqlora.data.rows import Conversation, Message, PromptCompletion, Row, RowRefused, Text
from spectraqlora.data.tokens import tokenized
from spectraqlora.data.turns import Learned, Span, TrainOn, learned
from spectraqlora.errors import InputError

SHORT_ANSWER_CHARACTERS = 100


@dataclass(frozen=True)
class RenderedRow:
    """One row as the model reads it.

    Args:
        input_ids: tokens.
        labels: next to the input ids, IGNORED where a token does not count; or a decoder's own sequence.
        text: what was rendered.
        spans: characters of the text that are learned, in order.
        turns: assistant's turns that are learned.
        unlearned: assistant's turns that are not, by reason.
        left_out: what the template does not write, by what it is.
    """

    input_ids: list[int]
    labels: list[int]
    text: str
    spans: list[Span] = field(default_factory=list)
    turns: int = 1
    unlearned: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return max(len(self.input_ids), len(self.labels))


@dataclass(frozen=True)
class _Plain:
    """Text to be tokenized whole, with the special tokens around it."""

    learned: Learned
    start: bool = False
    end: bool = False


def render(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    train_on: TrainOn = "assistant",
    template: ChatTemplate | None = None,
) -> RenderedRow:
    """A conversation's tokens, as `tokenizer.apply_chat_template(messages, tools=tools)` gives them, and labels.

    Args:
        tokenizer: one with a chat template.
        messages: in order; `weight` and `train` are not shown to the template.
        tools: functions that the conversation offers.
        train_on: every assistant's turn, the last one, or all of the text.
        template: the tokenizer's, where several conversations are rendered on one date.

    Raises:
        RowRefused: the template raises, or it cannot be told for sure what is the assistant's.
    """
    part = learned(template or ChatTemplate(tokenizer), messages, tools, train_on)
    tokens = tokenized(tokenizer, [part.text], [part.spans])[0]
    if isinstance(tokens, RowRefused):
        raise tokens
    return _rendered(*tokens, part)


class Renderer:
    """Renders rows for one model; only completions count where there is a prompt.

    Args:
        tokenizer: the model's.
        prompt_template: wraps `{prompt}` where the tokenizer has no chat template.
        encoder_decoder: whether the model reads the prompt in one sequence and answers in another.
        train_on: every assistant's turn, the last one, or all of the text.
        moment: what a template's date functions say; now where it is not given.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_template: str,
        encoder_decoder: bool = False,
        train_on: TrainOn = "assistant",
        moment: datetime | None = None,
    ) -> None:
        self.template = ChatTemplate(tokenizer, moment) if tokenizer.chat_template else None
        self._tokenizer, self._wrapper = tokenizer, prompt_template
        self._encoder_decoder, self._train_on = encoder_decoder, train_on
        self._special = special_tokens(tokenizer)
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""

    @property
    def source(self) -> str:
        """The chat template's Jinja text; empty where there is none."""
        return self.template.source() if self.template else ""

    def turn_ends(self) -> list[int]:
        """Tokens that end an answer: the template's, where it has one, and the tokenizer's end of sequence."""
        own = self.template.turn_end if self.template else None
        ends = [own, self._tokenizer.eos_token_id]
        return [token for index, token in enumerate(ends) if token is not None and token not in ends[:index]]

    def render(self, row: Row) -> RenderedRow:
        """A row's tokens and labels.

        Raises:
            InputError: plain text for an encoder-decoder model.
            RowRefused: it cannot be rendered, or nothing of it is learned.
        """
        result = self.render_all([row])[0]
        if isinstance(result, RowRefused):
            raise result
        return result

    def render_all(self, rows: Sequence[Row]) -> list[RenderedRow | RowRefused]:
        """What `render` gives or raises for each row; tokenized together, which is faster.

        Raises:
            InputError: plain text for an encoder-decoder model.
        """
        results: list[RenderedRow | RowRefused | _Plain] = []
        for row in rows:
            try:
                results.append(self._pair(row) if self._encoder_decoder else self._plain(row))
            except RowRefused as refused:
                results.append(refused)
        places = [place for place, result in enumerate(results) if isinstance(result, _Plain)]
        texts = [result.learned for result in results if isinstance(result, _Plain)]
        tokens = tokenized(self._tokenizer, [t.text for t in texts], [t.spans for t in texts])
        for place, made in zip(places, tokens, strict=True):
            plain = results[place]
            assert isinstance(plain, _Plain)
            results[place] = made if isinstance(made, RowRefused) else self._finished(*made, plain)
        return [result for result in results if not isinstance(result, _Plain)]

    def question(self, row: Row) -> tuple[str, str] | None:
        """(text that the model answers, answer) of a row.

        None where it has no answer of its own, or one that is too long to be compared and has no `####` in it.
        """
        if isinstance(row, Text):
            return None
        messages, tools = _messages(row)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        message = messages[last]
        answer = message.get("content")
        unfit = message.get("weight") == 0 or message.get("train") is False or message.get("tool_calls")
        if last == 0 or unfit or not isinstance(answer, str) or not answer.strip():
            return None
        if len(answer) > SHORT_ANSWER_CHARACTERS and "####" not in answer:
            return None
        try:
            prompt = self._prompt(row, messages[:last], tools)
        except RowRefused:
            return None
        return prompt + (self._eos if self._encoder_decoder else ""), answer

    def _plain(self, row: Row) -> _Plain:
        """What is to be tokenized of a row for a model that reads and writes one sequence."""
        if isinstance(row, Text):
            if not row.text.strip():
                raise RowRefused("no text")
            whole = Learned(row.text, [(0, len(row.text))], 0)
            return _Plain(whole, start=True, end=True)
        messages, tools = _messages(row)
        if isinstance(row, PromptCompletion) and self._is_rendered(row.prompt):
            return self._completed(row.prompt, row.completion)
        if self.template:
            return _Plain(learned(self.template, messages, tools, self._train_on))
        if isinstance(row, PromptCompletion) or [m["role"] for m in messages] == ["user", "assistant"]:
            prompt, completion = str(messages[0]["content"]), str(messages[1]["content"])
            if _is_off(messages[1]):
                raise RowRefused("no turn is learned", "weight 0 or train: false")
            prompt = self._wrapped(prompt)
            return self._completed(prompt, _gap(prompt, completion) + completion)
        return self._named(messages)

    def _completed(self, prompt: str, completion: str) -> _Plain:
        """A prompt and what completes it, in one text."""
        if not completion.strip():
            raise RowRefused("no answer")
        text = prompt + completion
        start = 0 if self._train_on == "all" else len(prompt)
        return _Plain(Learned(text, [(start, len(text))], 1), start=True, end=True)

    def _named(self, messages: list[Message]) -> _Plain:
        """All turns by the names of their roles, as models without a template have seen conversations."""
        turns = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
        chosen = [i for i in (turns[-1:] if self._train_on == "last" else turns) if not _is_off(messages[i])]
        if not chosen:
            raise RowRefused("no turn is learned" if turns else "no answer")
        text, spans = "", []
        for index, message in enumerate(messages):
            before, answer = self._turn(message)
            if index in chosen or (self._train_on == "all" and not _is_off(message)):
                start = len(text) if self._train_on == "all" else len(text) + len(before)
                spans.append((start, len(text) + len(before) + len(answer)))
            text += before + answer + ("\n" if answer[-1:] != "\n" and index < len(messages) - 1 else "")
        blank = {index for index in turns if not str(messages[index].get("content") or "").strip()}
        off = {
            "no answer": sum(_is_off(messages[index]) for index in blank),
            "weight 0 or train: false": sum(_is_off(messages[i]) and i not in blank for i in turns),
            "data.train_on=last": sum(i not in chosen and not _is_off(messages[i]) for i in turns),
        }
        counted = {why: count for why, count in off.items() if count}
        return _Plain(Learned(text, spans, len(chosen), counted), start=True)

    def _turn(self, message: Message) -> tuple[str, str]:
        """(what names the role, what is said and how it ends) of a message."""
        if message.get("tool_calls"):
            raise RowRefused("tool calls for a model without a chat template")
        content = str(message.get("content") or "")
        name = f"{message['role']}:"
        end = (self._eos or "\n") if message["role"] == "assistant" else ""
        if end and content.rstrip().endswith(end.strip() or end):
            end = ""
        return name, _gap(name, content) + content + end

    def _pair(self, row: Row) -> RenderedRow:
        """A question to the encoder and an answer by the decoder."""
        if isinstance(row, Text):
            raise InputError(
                "data columns", "text", "prompts and completions; an encoder-decoder model learns from pairs"
            )
        messages, tools = _messages(row)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        reply = messages[last].get("content")
        if last == 0 or not isinstance(reply, str) or not reply.strip() or _is_off(messages[last]):
            raise RowRefused("no answer")
        question = self._prompt(row, messages[:last], tools)
        end = [self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else []
        ids, labels = ([*self._ids(text), *end] for text in (question, reply))
        start = len(question) + 1
        return RenderedRow(ids, labels, f"{question} {reply}", [(start, start + len(reply))])

    def _prompt(self, row: Row, before: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """What the model reads before it answers."""
        if isinstance(row, PromptCompletion) and self._is_rendered(row.prompt):
            return row.prompt
        if self.template:
            seen = [{key: value for key, value in m.items() if key not in UNSEEN} for m in before]
            return self.template.prompt(seen, tools)
        start = "" if self._encoder_decoder else self._bos
        if len(before) == 1 and before[0]["role"] == "user":
            return start + self._wrapped(str(before[0]["content"]))
        turns = ["".join(self._turn(message)) for message in before]
        return start + "".join(turn if turn[-1:] == "\n" else f"{turn}\n" for turn in turns) + "assistant:"

    def _wrapped(self, prompt: str) -> str:
        return self._wrapper.replace("{prompt}", prompt)

    def _is_rendered(self, prompt: str) -> bool:
        """Whether a prompt begins as only rendered text does."""
        return bool(self._special.match(prompt.lstrip()))

    def _finished(self, ids: list[int], labels: list[int], plain: _Plain) -> RenderedRow:
        """With the special tokens around plain text, unless the text brings them."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if plain.start and bos is not None and ids[:1] != [bos]:
            every = self._train_on == "all" or plain.learned.turns == 0
            ids, labels = [bos, *ids], [bos if every else IGNORED, *labels]
        if plain.end and eos is not None and not plain.learned.text.rstrip().endswith(self._eos):
            ids, labels = [*ids, eos], [*labels, eos]
        return _rendered(ids, labels, plain.learned)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(row: Conversation | PromptCompletion) -> tuple[list[Message], list[dict[str, Any]] | None]:
    if isinstance(row, Conversation):
        return row.messages, row.tools
    return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}], None


def _is_off(message: Message) -> bool:
    return message.get("weight") == 0 or message.get("train") is False


def _gap(before: str, text: str) -> str:
    """A space where neither brings white space, so that the first word is the token that it is in a sentence."""
    return "" if before[-1:].isspace() or text[:1].isspace() else " "


def _rendered(ids: list[int], labels: list[int], part: Learned) -> RenderedRow:
    return RenderedRow(ids, labels, part.text, part.spans, part.turns, part.unlearned, part.left_out)
