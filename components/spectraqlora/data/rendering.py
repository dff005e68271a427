"""Rows as token ids and labels: with the model's chat template where it has one, else with `data.prompt_template`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from spectraqlora.artifacts import IGNORED
from spectraqlora.data.rows import Message, PromptCompletion, Row, RowRefused, Text
from spectraqlora.errors import InputError

SHORT_ANSWER_CHARACTERS = 100


@dataclass(frozen=True)
class RenderedRow:
    """One row as the model reads it.

    Args:
        input_ids: tokens.
        labels: next to the input ids, IGNORED where a token does not count; or a decoder's own sequence.
        text: what was rendered.
        unlearned: the assistant's turns that are not learned, by reason.
        left_out: what the template does not write of them.
    """

    input_ids: list[int]
    labels: list[int]
    text: str
    unlearned: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return max(len(self.input_ids), len(self.labels))


class Renderer:
    """Renders rows for one model; only completions count where there is a prompt.

    Args:
        tokenizer: the model's.
        prompt_template: wraps `{prompt}` where the tokenizer has no chat template.
        encoder_decoder: whether the model reads the prompt in one sequence and answers in another.
    """

    def __init__(self, tokenizer: Any, prompt_template: str, encoder_decoder: bool = False) -> None:
        self._tokenizer, self._template = tokenizer, prompt_template
        self._encoder_decoder = encoder_decoder
        self._chat = bool(tokenizer.chat_template)
        self._start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def render(self, row: Row) -> RenderedRow:
        """A row's tokens and labels.

        Raises:
            InputError: plain text for an encoder-decoder model.
            RowRefused: nothing of it is learned.
        """
        if isinstance(row, Text):
            if self._encoder_decoder:
                raise InputError(
                    "data columns",
                    "text",
                    "prompts and completions; an encoder-decoder model learns from pairs",
                )
            return self._plain(row.text)
        messages = _messages(row)
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise RowRefused("no answer")
        try:
            return self._pair(messages) if self._encoder_decoder else self._turns(messages)
        except TemplateError as error:
            raise RowRefused("refused by the chat template", str(error)) from None

    def render_all(self, rows: Sequence[Row]) -> list[RenderedRow | RowRefused]:
        """What `render` gives or raises for each row."""
        results: list[RenderedRow | RowRefused] = []
        for row in rows:
            try:
                results.append(self.render(row))
            except RowRefused as refused:
                results.append(refused)
        return results

    def question(self, row: Row) -> tuple[str, str] | None:
        """(text that the model answers, answer) of a row.

        None where its answer is too long to be compared, and does not end in a `####` answer.
        """
        if isinstance(row, Text):
            return None
        messages = _messages(row)
        answer = messages[-1]["content"]
        if len(answer) > SHORT_ANSWER_CHARACTERS and "####" not in answer:
            return None
        start = end = ""
        if self._encoder_decoder:
            end = self._tokenizer.eos_token or ""
        elif not self._chat:
            start = self._tokenizer.bos_token or ""
        return start + self._prompt(messages) + end, answer

    def _plain(self, text: str) -> RenderedRow:
        ids = [*self._start, *self._ids(text), *self._end]
        return RenderedRow(ids, list(ids), text)

    def _pair(self, messages: list[Message]) -> RenderedRow:
        question, reply = self._prompt(messages), messages[-1]["content"]
        ids, labels = [*self._ids(question), *self._end], [*self._ids(reply), *self._end]
        return RenderedRow(ids, labels, f"{question} {reply}")

    def _turns(self, messages: list[Message]) -> RenderedRow:
        """All turns in one sequence; the assistant's count."""
        ids, text = ([] if self._chat else list(self._start)), ""
        labels = [IGNORED] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._prompt(messages[: index + 1])
            if not prompt.startswith(text):
                # Templates that rewrite history: only the last turn can be learned from.
                if index < len(messages) - 1:
                    continue
                ids, labels, text = [], [], ""
            # A space of its own, so that the answer's first word is the token it is inside a sentence.
            gap = "" if prompt[-1:].isspace() or self._chat else " "
            content = gap + message["content"]
            context, answer = self._ids(prompt[len(text) :]), [*self._ids(content), *self._end]
            ids += context + answer
            labels += [IGNORED] * len(context) + answer
            text = prompt + content
        return RenderedRow(ids, labels, text)

    def _prompt(self, messages: list[Message]) -> str:
        """What the model reads before it answers the last turn."""
        before = messages[:-1]
        if self._chat:
            return str(
                self._tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
            )
        if len(before) == 1:
            return self._template.replace("{prompt}", before[0]["content"])
        return "".join(f"{m['role']}: {m['content']}\n" for m in before) + "assistant:"

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(row: Row) -> list[Message]:
    if isinstance(row, PromptCompletion):
        return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
    return [] if isinstance(row, Text) else row.messages
