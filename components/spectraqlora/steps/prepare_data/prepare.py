"""The step's work: load, render, drop, split and save."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import ModelOutline, PreparedRows
from spectraqlora.data.layouts import Layout, recognise
from spectraqlora.data.packing import packed
from spectraqlora.data.rendering import RenderedRow, Renderer
from spectraqlora.data.sources import load_source
from spectraqlora.data.splits import in_order, split_sizes
from spectraqlora.errors import InputError
from spectraqlora.models.families import context_length
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.places import data_place
from spectraqlora.runtime.console import Progress, say
from spectraqlora.settings import DataSettings

Tokens = dict[str, list[int]]


def prepare(
    settings: DataSettings, outline: Path, seed: int, output: Path, content: str = ""
) -> PreparedRows:
    """Write `train/` and `held_out/` (Arrow: input_ids, labels) and the manifest.

    Args:
        settings: the `data` section.
        outline: of the model, for its tokenizer.
        seed: of the split.
        output: the artifact's folder.
        content: what the source must hold, as `Place.digest` says it; empty takes what is there.

    Raises:
        InputError: the source cannot be read, fits no layout, or leaves no rows.
    """
    loaded = load_source(data_place(settings.source), settings, content)
    layout = recognise(loaded.column_names)
    renderer, length = _for_model(outline, settings, layout)
    pack = layout == "text" and settings.pack
    rendered = _render(in_order(loaded, settings, seed), renderer, None if pack else length)
    if len(rendered.rows) < 2:
        expected = f"a length that leaves rows; {rendered.too_long} of {rendered.total} are longer"
        raise InputError("data.max_length", length, expected)
    train_rows, held_out_rows = split_sizes(len(rendered.rows), settings)
    parts = {
        "train": rendered.rows[held_out_rows : held_out_rows + train_rows],
        "held_out": rendered.rows[:held_out_rows],
    }
    splits = {name: _tokens(rows, length if pack else 0) for name, rows in parts.items()}
    result = PreparedRows(
        source=settings.source,
        digest=_write(splits, output),
        layout=layout,
        train_rows=len(splits["train"]),
        eval_rows=len(splits["held_out"]),
        train_tokens=sum(len(row["input_ids"]) for row in splits["train"]),
        dropped_empty=rendered.empty,
        dropped_long=rendered.too_long,
        examples=[row.text for row in rendered.rows[:3]],
        answers=_answers(renderer, rendered.originals[:held_out_rows]),
    )
    result.write(output)
    return result


def _for_model(outline: Path, settings: DataSettings, layout: Layout) -> tuple[Renderer, int]:
    """What renders rows for the model, and the tokens that a row may have."""
    from transformers import AutoConfig

    folder, trust = outline / "model", ModelOutline.read(outline).trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    tokenizer = load_tokenizer(folder, trust)
    length = min(settings.max_length, context_length(config) or settings.max_length)
    if length < settings.max_length:
        say(f"rows end at the model's {length} positions, not at data.max_length={settings.max_length}")
    return Renderer(tokenizer, layout, settings.prompt_template, config.is_encoder_decoder), length


@dataclass
class _Rendered:
    """Rows that stay, next to what they were made of, and how many were dropped."""

    total: int
    rows: list[RenderedRow] = field(default_factory=list)
    originals: list[dict[str, Any]] = field(default_factory=list)
    empty: int = 0
    too_long: int = 0


def _render(loaded: Any, renderer: Renderer, length: int | None) -> _Rendered:
    """Render rows, dropping empty ones and those of more than `length` tokens."""
    result = _Rendered(len(loaded))
    progress = Progress("tokenizing rows", len(loaded))
    for index, original in enumerate(loaded, 1):
        progress(index)
        row = renderer.render(original)
        if row is None:
            result.empty += 1
        elif length is not None and row.length > length:
            result.too_long += 1
        else:
            result.rows.append(row)
            result.originals.append(original)
    if result.empty or result.too_long:
        say(f"dropped {result.empty} empty and {result.too_long} over-long rows of {result.total}")
    return result


def _tokens(rows: list[RenderedRow], pack_to: int) -> list[Tokens]:
    """Token ids and labels; with `pack_to`, of full sequences of that length in which every token counts."""
    if not pack_to:
        return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    sequences = packed([row.input_ids for row in rows], pack_to)
    return [{"input_ids": ids, "labels": list(ids)} for ids in sequences]


def _write(splits: dict[str, list[Tokens]], output: Path) -> str:
    """Save every split as an Arrow folder; returns the digest of all of them."""
    from datasets import Dataset

    total = hashlib.sha256()
    for name, rows in splits.items():
        total.update(json.dumps([name, rows]).encode())
        Dataset.from_list(rows).save_to_disk(str(output / name))
    return total.hexdigest()


def _answers(renderer: Renderer, held_out: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Prompts and references of the held-out rows that can be scored."""
    questions = [renderer.question(row) for row in held_out]
    return [{"prompt": question[0], "answer": question[1]} for question in questions if question]
