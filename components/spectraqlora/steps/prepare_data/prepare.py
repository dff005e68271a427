"""The step's work: read, choose, render, split and save; and an account of all of it."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spectraqlora.artifacts import IGNORED, DataAccount, Example, ModelOutline, PreparedRows, SourceAccount
from spectraqlora.data.accounting import TOO_LONG, Counter, lines, quantiles, warning
from spectraqlora.data.for_model import RowModel, row_model
from spectraqlora.data.packing import packed
from spectraqlora.data.preparing import Piece, Rendered, Sequences, Survey, render, survey
from spectraqlora.data.rendering import Renderer
from spectraqlora.data.rows import Row
from spectraqlora.data.sources import Source, open_sources
from spectraqlora.data.splits import HELD_OUT, TEST, TRAIN, USED, Choice, choose, part_rows, side_sizes
from spectraqlora.errors import InputError
from spectraqlora.runtime.console import Progress, say, warn
from spectraqlora.settings import DataSettings

EXAMPLES = 3
_WRITTEN_ROWS = 1000
_SAID_EVERY = 1_000_000
Places = npt.NDArray[np.int64]


def prepare(
    settings: DataSettings, outline: Path, seed: int, output: Path, content: str = ""
) -> PreparedRows:
    """Write `train/`, `held_out/` and, where there are test rows, `test/` (Arrow: input_ids, labels), and the manifest.

    Args:
        settings: the `data` section.
        outline: of the model, for its tokenizer.
        seed: of the split.
        output: the artifact's folder.
        content: what the source must hold, as `Place.digest` says it; empty takes what is there.

    Raises:
        InputError: the source cannot be read, fits no layout, or leaves no rows.
    """
    folder, trust = outline / "model", ModelOutline.read(outline).trust_remote_code
    return prepare_for(row_model(folder, settings, trust), settings, seed, output, content)


def prepare_for(
    model: RowModel, settings: DataSettings, seed: int, output: Path, content: str = ""
) -> PreparedRows:
    """The same for a model that is described elsewhere, such as by its own folder.

    Raises:
        InputError: as `prepare`.
    """
    if model.length < settings.max_length:
        say(f"rows end at the model's {model.length} positions, not at data.max_length={settings.max_length}")
    source = open_sources(settings, content)
    surveyed = survey(source, settings, _say_read)
    choice = choose(surveyed.splits, surveyed.keys, settings, seed, surveyed.groups, surveyed.sources)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        rendered = _rendered(source, settings, choice, model, Path(scratch), surveyed.counter)
        sides = _sides(source, settings, surveyed, choice, rendered, model.length)
        result = _written(settings, source, surveyed, choice, rendered, sides, model, output, Path(scratch))
    result.write(output)
    for line in lines(result):
        say(line)
    if lost := warning(result):
        warn(lost)
    return result


def _say_read(count: int) -> None:
    if count % _SAID_EVERY == 0:
        say(f"read {count:,} rows")


def _rendered(
    source: Source,
    settings: DataSettings,
    choice: Choice,
    model: RowModel,
    scratch: Path,
    counter: Counter,
) -> Rendered:
    total = int((choice.fates == USED).sum())
    progress, start = Progress("tokenizing rows", total), time.monotonic()

    def report(done: int) -> None:
        progress(done, f"({done / max(time.monotonic() - start, 1e-9):,.0f} rows/s)")

    # The rows that are held out follow the test's, the first ones in order, less those that rendering drops.
    shares = (
        (settings.test_fraction, settings.max_test_rows),
        (settings.eval_fraction, settings.max_eval_rows),
    )
    likely = int(4 * sum(min(len(choice.order) * share, most) for share, most in shares)) + 64
    keep = set(choice.held_out.tolist()) or set(choice.order[:likely].tolist())
    return render(
        source,
        settings,
        choice,
        model.renderer,
        model.length,
        scratch,
        counter,
        report,
        keep,
        model.encoder_decoder,
    )


def _sides(
    source: Source,
    settings: DataSettings,
    surveyed: Survey,
    choice: Choice,
    rendered: Rendered,
    length: int,
) -> dict[str, Places]:
    """Places of sequences by side, in the order that they are written in.

    Raises:
        InputError: there is nothing on one of the sides.
    """
    row, counter = rendered.sequences.row, surveyed.counter
    split = surveyed.splits[row]
    train = _ordered(row, np.flatnonzero(split == TRAIN), choice.order)
    held_out = _ordered(row, np.flatnonzero(split == HELD_OUT), choice.held_out)
    own = "held_out" in source.splits
    too_few = len(train) < (1 if own else 2) or (own and not len(held_out))
    if too_few and counter.dropped:
        if counter.dropped.keys() == {TOO_LONG}:
            entry = counter.dropped[TOO_LONG]
            raise InputError(
                "data.max_length",
                length,
                f"a length that leaves rows on both sides; {entry.rows} of {surveyed.read} rows are longer "
                f"({entry.first}); data.too_long cuts or splits them",
            )
        raise InputError(
            "data.source",
            settings.named,
            f"rows to learn from and to hold out; of {surveyed.read} rows: {counter.reasons()}",
        )
    if own and too_few:
        raise InputError("data.source", settings.named, "rows both to train on and to hold out")
    test = _ordered(row, np.flatnonzero(split == TEST), choice.test)
    parted = part_rows(surveyed.keys[row[train]], *side_sizes(len(train), settings, source.splits))
    sides = {
        "train": train[~parted.test & ~parted.held_out],
        "held_out": held_out if own else train[parted.held_out],
        "test": test if "test" in source.splits else train[parted.test],
    }
    return {name: places for name, places in sides.items() if name != "test" or len(places)}


def _ordered(row: Places, sequences: Places, order: Places) -> Places:
    """Sequences in the order of their rows; pieces of a row in their own."""
    rank = np.zeros(int(row.max(initial=-1)) + 1, np.int64)
    known = order[order < len(rank)]
    rank[known] = np.arange(len(known))
    return sequences[np.argsort(rank[row[sequences]], kind="stable")]


def _written(
    settings: DataSettings,
    source: Source,
    surveyed: Survey,
    choice: Choice,
    rendered: Rendered,
    sides: dict[str, Places],
    model: RowModel,
    output: Path,
    scratch: Path,
) -> PreparedRows:
    pack = settings.pack and surveyed.layouts == ["text"]
    total, counts = hashlib.sha256(), {}
    for name, places in sides.items():
        pieces = rendered.sequences.take(places)
        writer = _Side(name, total)
        writer.write(packed(pieces, model.length) if pack else pieces, scratch, output / name)
        counts[name] = writer
    held_out = rendered.sequences.row[sides["held_out"]]
    used_rows = len(np.unique(rendered.sequences.row))
    return PreparedRows(
        source=settings.named,
        digest=total.hexdigest(),
        layout=" and ".join(surveyed.layouts),
        train_rows=counts["train"].rows,
        eval_rows=counts["held_out"].rows,
        test_rows=counts["test"].rows if "test" in counts else 0,
        train_tokens=counts["train"].tokens,
        account=DataAccount(
            files={name: len(files) for name, files in source.splits.items()},
            unused_files=source.unused,
            read=surveyed.read,
            used=used_rows,
            dropped=list(surveyed.counter.dropped.values()),
            sources=_by_source(settings, surveyed, rendered, sides),
            pieces=len(rendered.sequences) - used_rows,
            cut=rendered.cut,
            equal=choice.equal,
            sides_equal=choice.equal > 0 and len(np.unique(surveyed.keys[rendered.sequences.row])) == 1,
            unused_columns=surveyed.unused_columns,
            turns_without_labels=dict(rendered.unlearned),
            left_out=dict(rendered.left_out),
            tokens_read=rendered.tokens,
            tokens_learned=counts["train"].learned,
            max_length=model.length,
            lengths=quantiles(rendered.lengths),
        ),
        examples=_examples(rendered.sequences, sides["train"], model),
        answers=_answers(
            source, settings, model.renderer, choice, list(dict.fromkeys(held_out.tolist())), rendered
        ),
        turn_ends=model.renderer.turn_ends(),
        chat_template=model.renderer.source if settings.chat_template else "",
        shared_sequences=settings.packing == "rows",
    )


def _by_source(
    settings: DataSettings, surveyed: Survey, rendered: Rendered, sides: dict[str, Places]
) -> list[SourceAccount]:
    """What became of each source's rows; nothing where there is one source."""
    if len(settings.parts) < 2:
        return []
    used = {
        name: np.bincount(
            surveyed.sources[np.unique(rendered.sequences.row[places])], minlength=len(settings.parts)
        )
        for name, places in sides.items()
    }
    return [
        SourceAccount(
            source=part.source,
            weight=part.weight,
            read=surveyed.read_of[number],
            train=int(used["train"][number]),
            held_out=int(used["held_out"][number]),
            test=int(used["test"][number]) if "test" in used else 0,
            dropped=dict(surveyed.counter.of_source.get(number, {})),
        )
        for number, part in enumerate(settings.parts)
    ]


class _Side:
    """Writes one side's sequences as an Arrow folder, and counts them.

    Args:
        name: of the side.
        total: takes its content into a digest.
    """

    def __init__(self, name: str, total: Any) -> None:
        self.rows, self.tokens, self.learned = 0, 0, 0
        self._total = total
        total.update(name.encode())

    def write(self, pieces: Iterator[Piece], scratch: Path, folder: Path) -> None:
        """Write all sequences; memory holds a thousand at a time."""
        import pyarrow as pa
        from datasets import Dataset

        numbers = pa.list_(pa.int32())
        schema = pa.schema({"input_ids": numbers, "labels": numbers})
        path = scratch / "side.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            batch: list[Piece] = []
            for piece in pieces:
                batch.append(piece)
                if len(batch) == _WRITTEN_ROWS:
                    stream.write_batch(self._batch(batch, schema))
                    batch = []
            if batch:
                stream.write_batch(self._batch(batch, schema))
        Dataset.from_file(str(path)).save_to_disk(str(folder))
        path.unlink()

    def _batch(self, batch: list[Piece], schema: Any) -> Any:
        import pyarrow as pa

        columns = []
        for part in (0, 1):
            ends = np.cumsum([0, *(len(piece[part]) for piece in batch)], dtype=np.int32)
            values = np.concatenate([piece[part] for piece in batch])
            columns.append(pa.ListArray.from_arrays(pa.array(ends), pa.array(values)))
            self._total.update(ends.tobytes())
            self._total.update(values.tobytes())
            if part:
                self.learned += int((values != IGNORED).sum())
            else:
                self.tokens += len(values)
        self.rows += len(batch)
        return pa.record_batch(columns, schema=schema)


def _examples(sequences: Sequences, train: Places, model: RowModel) -> list[Example]:
    """The first training sequences as text, with the learned part marked."""
    examples = []
    for ids, labels in sequences.take(train[:EXAMPLES]):
        if model.encoder_decoder:
            examples.append([(model.tokenizer.decode(ids), False), (model.tokenizer.decode(labels), True)])
            continue
        learned = labels != IGNORED
        starts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
        examples.append(
            [
                (model.tokenizer.decode(ids[start:end].tolist()), bool(learned[start]))
                for start, end in itertools.pairwise(starts)
                if end > start
            ]
        )
    return examples


def _answers(
    source: Source,
    settings: DataSettings,
    renderer: Renderer,
    choice: Choice,
    held_out: list[int],
    rendered: Rendered,
) -> list[dict[str, str]]:
    """Prompts and references of the held-out rows that can be scored."""
    rows = dict(rendered.kept)
    missing = set(held_out) - rows.keys()
    if missing:
        rows |= _rows_at(source, settings, missing)
    questions = [renderer.question(rows[place]) for place in held_out]
    return [{"prompt": question[0], "answer": question[1]} for question in questions if question]


def _rows_at(source: Source, settings: DataSettings, places: set[int]) -> dict[int, Row]:
    """The rows at some places, read once more."""
    learnable = (
        row for split in source.splits for row in source.rows(settings, split) if not isinstance(row, tuple)
    )
    return {place: row for place, row in enumerate(learnable) if place in places}
