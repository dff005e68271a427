"""Rows as token ids and labels: with the model's chat template where it has one, else with `data.prompt_template`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectraqlora.artifacts import IGNORED
from spectraqlora.data.conversations import Messages, messages_of
from spectraqlora.data.layouts import Layout
from spectraqlora.errors import InputError

SHORT_ANSWER_CHARACTERS = 100


@dataclass(frozen=True)
class RenderedRow:
    """One row as the model reads it.

    Args:
        input_ids: tokens.
        labels: next to the input ids, IGNORED where a token does not count; or a decoder's own sequence.
        text: what was rendered.
    """

    input_ids: list[int]
    labels: list[int]
    text: str

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return max(len(self.input_ids), len(self.labels))


class Renderer:
    """Renders rows of one layout for one model; only completions count where there is a prompt.

    Args:
        tokenizer: the model's.
        layout: of the rows.
        prompt_template: wraps `{prompt}` where the tokenizer has no chat template.
        encoder_decoder: whether the model reads the prompt in one sequence and answers in another.

    Raises:
        InputError: plain text for an encoder-decoder model.
    """

    def __init__(self, tokenizer: Any, layout: Layout, prompt_template: str, encoder_decoder: bool) -> None:
        if encoder_decoder and layout == "text":
            raise InputError(
                "data columns", "text", "prompts and completions; an encoder-decoder model learns from pairs"
            )
        self.layout = layout
        self._tokenizer, self._template = tokenizer, prompt_template
        self._encoder_decoder = encoder_decoder
        self._chat = bool(tokenizer.chat_template)
        self._start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def render(self, row: Mapping[str, Any]) -> RenderedRow | None:
        """A row's tokens and labels; None where it is empty."""
        if self.layout == "text":
            return self._plain(str(row["text"] or ""))
        messages = messages_of(self.layout, row)
        if not messages:
            return None
        return self._pair(messages) if self._encoder_decoder else self._turns(messages)

    def question(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """(text that the model answers, answer) of a row that is not empty.

        None where its answer is too long to be compared, and does not end in a `####` answer.
        """
        if self.layout == "text":
            return None
        messages = messages_of(self.layout, row)
        answer = messages[-1]["content"]
        if len(answer) > SHORT_ANSWER_CHARACTERS and "####" not in answer:
            return None
        start = end = ""
        if self._encoder_decoder:
            end = self._tokenizer.eos_token or ""
        elif not self._chat:
            start = self._tokenizer.bos_token or ""
        return start + self._prompt(messages) + end, answer

    def _plain(self, text: str) -> RenderedRow | None:
        if not text.strip():
            return None
        ids = [*self._start, *self._ids(text), *self._end]
        return RenderedRow(ids, list(ids), text)

    def _pair(self, messages: Messages) -> RenderedRow:
        question, reply = self._prompt(messages), messages[-1]["content"]
        ids, labels = [*self._ids(question), *self._end], [*self._ids(reply), *self._end]
        return RenderedRow(ids, labels, f"{question} {reply}")

    def _turns(self, messages: Messages) -> RenderedRow:
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

    def _prompt(self, messages: Messages) -> str:
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
