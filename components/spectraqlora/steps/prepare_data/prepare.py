"""The step's work: load, tokenize, drop, split and save."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import ModelOutline, PreparedRows
from spectraqlora.data.layouts import Layout, messages_of, recognise
from spectraqlora.data.sources import (
    LOADERS,
    check_source,
    files_of,
    is_hub_id,
    local_source,
    split_sizes,
)
from spectraqlora.errors import InputError
from spectraqlora.models.families import context_length
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.runtime.console import Progress
from spectraqlora.settings import DataSettings

IGNORED = -100
SHORT_ANSWER_CHARACTERS = 100


class _Encoder:
    """Turns rows into token ids and labels; only completions count where there is a prompt."""

    def __init__(self, tokenizer: Any, settings: DataSettings, layout: Layout, encoder_decoder: bool) -> None:
        if encoder_decoder and layout == "text":
            raise InputError(
                "data columns", "text", "prompts and completions; an encoder-decoder model learns from pairs"
            )
        self.tokenizer, self.settings, self.layout = tokenizer, settings, layout
        self.encoder_decoder = encoder_decoder
        self.chat_template = bool(tokenizer.chat_template)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_text(self, messages: list[dict[str, str]]) -> str:
        """What the model reads before it answers the last turn."""
        before = messages[:-1]
        if self.chat_template:
            return str(self.tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
        if len(before) == 1:
            return self.settings.prompt_template.replace("{prompt}", before[0]["content"])
        return "".join(f"{m['role']}: {m['content']}\n" for m in before) + "assistant:"

    def encode(self, row: dict[str, Any]) -> tuple[list[int], list[int], str] | None:
        """(input ids, labels, text) of a row; None where it is empty.

        Labels stand beside the input ids, or are a decoder's own sequence.
        """
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        start = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        if self.layout == "text":
            text = str(row["text"] or "")
            if not text.strip():
                return None
            ids = [*start, *self._ids(text), *end]
            return ids, list(ids), text
        messages = messages_of(self.layout, row)
        if not messages:
            return None
        if self.encoder_decoder:
            question, reply = self.prompt_text(messages), messages[-1]["content"]
            return [*self._ids(question), *end], [*self._ids(reply), *end], f"{question} {reply}"
        ids, labels, text = ([] if self.chat_template else list(start)), [], ""
        labels = [IGNORED] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.prompt_text(messages[: index + 1])
            if not prompt.startswith(text):
                # Templates that rewrite history: only the last turn can be learned from.
                if index < len(messages) - 1:
                    continue
                ids, labels, text = [], [], ""
            # A space of its own, so that the answer's first word is the token it is inside a sentence.
            gap = "" if prompt[-1:].isspace() or self.chat_template else " "
            content = gap + message["content"]
            context, answer = self._ids(prompt[len(text) :]), [*self._ids(content), *end]
            ids += context + answer
            labels += [IGNORED] * len(context) + answer
            text = prompt + content
        return ids, labels, text


def _load(settings: DataSettings, content: str) -> Any:
    from datasets import load_dataset

    if is_hub_id(settings.source):
        try:
            return load_dataset(settings.source, split=settings.split)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError("data.source", settings.source, f"a hub data set that loads ({first})") from None
    local = local_source(settings.source, content)
    check_source(settings.model_copy(update={"source": local}))
    files = files_of(local)
    try:
        return load_dataset(LOADERS[files[0].suffix], data_files=[str(f) for f in files], split="train")
    except Exception as error:
        first = (str(error.__cause__ or error).splitlines() or [""])[0]
        raise InputError("data.source", settings.source, f"rows of one shape ({first})") from None


def prepare(
    settings: DataSettings, outline: Path, seed: int, output: Path, content: str = ""
) -> PreparedRows:
    """Write `train/` and `held_out/` (Arrow: input_ids, labels) and the manifest.

    Args:
        settings: the `data` section.
        outline: of the model, for its tokenizer.
        seed: of the split.
        output: the artifact's folder.
        content: what an s3:// source must hold, as `storage.content_digest` says it; empty takes what is there.

    Raises:
        InputError: the source cannot be read, fits no layout, or leaves no rows.
    """
    from datasets import Dataset
    from transformers import AutoConfig

    raw = _load(settings, content)
    layout = recognise(raw.column_names)
    folder, trust = outline / "model", ModelOutline.read(outline).trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    encoder = _Encoder(load_tokenizer(folder, trust), settings, layout, config.is_encoder_decoder)
    length = min(settings.max_length, context_length(config) or settings.max_length)
    if length < settings.max_length:
        print(f"rows end at the model's {length} positions, not at data.max_length={settings.max_length}")
    raw = raw.shuffle(seed=seed) if settings.split_by == "shuffle" else _by_content(raw, seed)
    if settings.max_rows:
        raw = raw.select(range(min(len(raw), settings.max_rows)))
    kept: list[dict[str, Any]] = []
    empty = too_long = 0
    progress = Progress("tokenizing rows", len(raw))
    for index, row in enumerate(raw, 1):
        progress(index)
        encoded = encoder.encode(row)
        if encoded is None:
            empty += 1
            continue
        ids, labels, text = encoded
        if max(len(ids), len(labels)) > length and not (layout == "text" and settings.pack):
            too_long += 1
            continue
        kept.append({"input_ids": ids, "labels": labels, "text": text, "row": row})
    if empty or too_long:
        print(f"dropped {empty} empty and {too_long} over-long rows of {len(raw)}")
    if len(kept) < 2:
        raise InputError(
            "data.max_length",
            length,
            f"a length that leaves rows; {too_long} of {len(raw)} are longer",
        )
    train_count, eval_count = split_sizes(len(kept), settings)
    held_out, train = kept[:eval_count], kept[eval_count : eval_count + train_count]
    splits = {"train": _tokens(train), "held_out": _tokens(held_out)}
    if layout == "text" and settings.pack:
        splits = {name: _packed(rows, length) for name, rows in splits.items()}
    total = hashlib.sha256()
    for name, rows in splits.items():
        total.update(json.dumps([name, rows]).encode())
        Dataset.from_list(rows).save_to_disk(str(output / name))
    result = PreparedRows(
        source=settings.source,
        digest=total.hexdigest(),
        layout=layout,
        train_rows=len(splits["train"]),
        eval_rows=len(splits["held_out"]),
        train_tokens=sum(len(row["input_ids"]) for row in splits["train"]),
        dropped_empty=empty,
        dropped_long=too_long,
        examples=[row["text"] for row in kept[:3]],
        answers=_answers(encoder, held_out),
    )
    result.write(output)
    return result


def _by_content(raw: Any, seed: int) -> Any:
    """Rows in the order of a digest of each: the first ones, which are held out, stay so as data grows."""
    keys = [
        hashlib.sha256(f"{seed}{json.dumps(row, sort_keys=True, default=str)}".encode()).digest()
        for row in raw
    ]
    return raw.select(sorted(range(len(keys)), key=keys.__getitem__))


def _tokens(rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]


def _packed(rows: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """All tokens in a row, cut into full sequences; a short rest is kept only where it is all there is."""
    ids = [token for row in rows for token in row["input_ids"]]
    full = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)] or [ids]
    return [{"input_ids": part, "labels": list(part)} for part in full]


def _answers(encoder: _Encoder, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Prompts and references of held-out rows whose answer is short, or ends in a `####` answer."""
    if encoder.layout == "text":
        return []
    start = end = ""
    if encoder.encoder_decoder:
        end = encoder.tokenizer.eos_token or ""
    elif not encoder.chat_template:
        start = encoder.tokenizer.bos_token or ""
    found = []
    for row in rows:
        messages = messages_of(encoder.layout, row["row"])
        answer = messages[-1]["content"]
        if len(answer) <= SHORT_ANSWER_CHARACTERS or "####" in answer:
            found.append({"prompt": start + encoder.prompt_text(messages) + end, "answer": answer})
    return found
