"""Rows on their way to token ids, as a stream: memory does not grow with them, but for some bytes a row.

First all rows are read once: what they are, which are equal, which are used (`survey`). Then those that are used are
read again and rendered by all cores (`render`), into plain files of numbers, from which the sides are written.
"""

from __future__ import annotations

import array
import collections
import itertools
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spectraqlora.artifacts import IGNORED
from spectraqlora.data.accounting import TOO_LONG, Counter
from spectraqlora.data.layouts import MARKED_BAD
from spectraqlora.data.near import FUNCTIONS, Places, signature
from spectraqlora.data.near import groups as near_groups
from spectraqlora.data.rendering import RenderedRow, Renderer
from spectraqlora.data.rows import Origin, Row, RowRefused, Text
from spectraqlora.data.sources import Source
from spectraqlora.data.splits import (
    HELD_OUT,
    REASONS,
    TEST,
    TRAIN,
    USED,
    Choice,
    Keys,
    Split,
    row_text,
    text_key,
)
from spectraqlora.runtime.threads import threads_per_process
from spectraqlora.settings import DataSettings

_BATCH = 256
_ROWS_FOR_PROCESSES = 4000
"""Fewer rows are rendered sooner than processes start."""
CODES: dict[Split, int] = {"train": TRAIN, "held_out": HELD_OUT, "test": TEST}
Numbers = npt.NDArray[np.int32]


@dataclass
class Survey:
    """What reading all rows once says.

    Args:
        read: rows read.
        splits: TRAIN, HELD_OUT or TEST of every row that can be learned from.
        keys: of the same rows.
        groups: place of the first of the rows that are nearly equal to each other, of the same rows; None where
            `data.deduplicate` is not near.
        sources: place of each row's source among `data.sources`, of the same rows.
        read_of: rows read of each source.
        layouts: names of the layouts that there are.
        unused_columns: columns of which nothing is used, in order of appearance.
        counter: counts rows from which there is nothing to learn.
    """

    read: int
    splits: npt.NDArray[np.uint8]
    keys: Keys
    groups: Places | None
    sources: npt.NDArray[np.uint16]
    read_of: collections.Counter[int]
    layouts: list[str]
    unused_columns: list[str]
    counter: Counter


def survey(source: Source, settings: DataSettings, progress: Callable[[int], None]) -> Survey:
    """Read all rows of a source.

    Args:
        source: of the rows.
        settings: the `data` section.
        progress: called with the number of rows read so far.

    Raises:
        InputError: a file that cannot be read, or a row that is none.
    """
    counter, read = Counter(), 0
    near, sources = array.array("H"), array.array("H")
    read_of: collections.Counter[int] = collections.Counter()
    parts: list[Keys] = []
    splits: list[npt.NDArray[np.uint8]] = []
    layouts: dict[str, None] = {}
    columns: dict[str, None] = {}
    used: set[str] = set()
    seen: set[tuple[tuple[str, ...], str]] = set()

    def keys_of(split: Split) -> Iterator[int]:
        nonlocal read
        for origin, record, layout in source.records(settings, split):
            read += 1
            read_of[origin.source] += 1
            progress(read)
            names = tuple(record)
            if (names, layout.name) not in seen:
                seen.add((names, layout.name))
                columns.update(dict.fromkeys(names))
                layouts[layout.name] = None
            if not used.issuperset(layout.columns.values()):
                used.update(layout.columns.values())
            try:
                text = row_text(layout.row(record, origin))
            except RowRefused as refused:
                asked_for = refused.reason == MARKED_BAD
                counter.drop(refused.reason, origin, refused.detail, asked_for=asked_for)
                continue
            if settings.deduplicate == "near":
                near.frombytes(signature(text).tobytes())
            sources.append(origin.source)
            yield text_key(text)

    for split in source.splits:
        keys = np.fromiter(keys_of(split), np.uint64)
        parts.append(keys)
        splits.append(np.full(len(keys), CODES[split], np.uint8))
    unused = [name for name in columns if name and name not in used]
    groups = None
    if settings.deduplicate == "near":
        groups = near_groups(np.frombuffer(near, np.uint16).reshape(-1, FUNCTIONS))
    return Survey(
        read,
        np.concatenate(splits),
        np.concatenate(parts),
        groups,
        np.frombuffer(sources, np.uint16),
        read_of,
        list(layouts),
        unused,
        counter,
    )


@dataclass
class Sequences:
    """Rendered rows, or pieces of them, in files of numbers.

    Args:
        folder: of the files.
        row: place of the row that each is of, as `survey` counts.
        starts: where each begins among the token ids, and one more at the end.
        label_starts: the same of the labels.
    """

    folder: Path
    row: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    starts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    label_starts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))

    def __len__(self) -> int:
        return len(self.row)

    def take(self, places: Iterable[int]) -> Iterator[tuple[Numbers, Numbers]]:
        """(token ids, labels) of some, in the order asked for."""
        if not len(self):
            return
        ids = np.memmap(self.folder / "ids", np.int32, "r")
        labels = np.memmap(self.folder / "labels", np.int32, "r")
        for place in places:
            yield (
                ids[self.starts[place] : self.starts[place + 1]],
                labels[self.label_starts[place] : self.label_starts[place + 1]],
            )


@dataclass
class Rendered:
    """What rendering came to.

    Args:
        sequences: of all rows that stay.
        lengths: tokens of every rendered row, dropped ones too.
        tokens: of the same rows together.
        unlearned: the assistant's turns that are not learned, by reason.
        left_out: what the template does not write of them.
        cut: rows that were cut.
        kept: rows by place, of those that were asked for.
    """

    sequences: Sequences
    lengths: npt.NDArray[np.int64]
    tokens: int = 0
    unlearned: collections.Counter[str] = field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)
    cut: int = 0
    kept: dict[int, Row] = field(default_factory=dict)


Piece = tuple[Numbers, Numbers]


@dataclass(frozen=True)
class _Result:
    """A row after rendering: its pieces, or why there are none."""

    pieces: list[Piece]
    length: int
    unlearned: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    cut: bool = False
    refused: tuple[str, str] | None = None


def render(
    source: Source,
    settings: DataSettings,
    choice: Choice,
    renderer: Renderer,
    length: int,
    folder: Path,
    counter: Counter,
    progress: Callable[[int], None],
    keep: Collection[int] = (),
    encoder_decoder: bool = False,
) -> Rendered:
    """Read the source again, and render the rows that are used.

    Args:
        source: of the rows.
        settings: the `data` section.
        choice: which of them are used.
        renderer: of the model.
        length: most tokens of a sequence.
        folder: for the files of numbers.
        counter: counts the others.
        progress: called with the number of rows rendered so far.
        keep: places of rows to keep.
        encoder_decoder: whether a row is two sequences.
    """
    workers = threads_per_process() if (choice.fates == USED).sum() >= _ROWS_FOR_PROCESSES else 1
    work = _Work(renderer, length, settings.too_long, settings.pack, encoder_decoder)
    result = Rendered(Sequences(folder), np.zeros(0, np.int64))
    origins: collections.deque[tuple[int, Origin]] = collections.deque()
    rows, starts, label_starts = [], [0], [0]
    lengths: list[int] = []
    with open(folder / "ids", "wb") as ids, open(folder / "labels", "wb") as labels:
        for done, rendered in enumerate(
            _rendered(
                _batches(_used(source, settings, choice, counter, origins, keep, result.kept)), work, workers
            ),
            1,
        ):
            place, origin = origins.popleft()
            progress(done)
            if rendered.length:
                lengths.append(rendered.length)
                result.tokens += rendered.length
            if rendered.refused is not None:
                reason, detail = rendered.refused
                setting = "data.max_length or data.too_long" if reason == TOO_LONG else ""
                counter.drop(reason, origin, detail, setting)
                continue
            result.unlearned.update(rendered.unlearned)
            result.left_out.update(rendered.left_out)
            result.cut += rendered.cut
            for piece_ids, piece_labels in rendered.pieces:
                rows.append(place)
                starts.append(starts[-1] + len(piece_ids))
                label_starts.append(label_starts[-1] + len(piece_labels))
                ids.write(piece_ids.tobytes())
                labels.write(piece_labels.tobytes())
    result.lengths = np.array(lengths, np.int64)
    result.sequences = Sequences(
        folder, np.array(rows, np.int64), np.array(starts, np.int64), np.array(label_starts, np.int64)
    )
    return result


def _used(
    source: Source,
    settings: DataSettings,
    choice: Choice,
    counter: Counter,
    origins: collections.deque[tuple[int, Origin]],
    keep: Collection[int],
    kept: dict[int, Row],
) -> Iterator[Row]:
    """The rows that are used; their places and origins go to `origins`, all others to the counter."""
    place = 0
    for split in source.splits:
        for row in source.rows(settings, split):
            if isinstance(row, tuple):  # The survey has counted it.
                continue
            fate = int(choice.fates[place])
            if fate == USED:
                origins.append((place, row.origin))
                if place in keep:
                    kept[place] = row
                yield row
            else:
                reason, setting, asked_for = REASONS[fate]
                counter.drop(reason, row.origin, "", setting, asked_for)
            place += 1


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


@dataclass(frozen=True)
class _Work:
    """Renders rows and brings them to length."""

    renderer: Renderer
    length: int
    too_long: str
    pack: bool
    encoder_decoder: bool

    def __call__(self, rows: list[Row]) -> list[_Result]:
        rendered = self.renderer.render_all(rows)
        return [self._result(made, row) for made, row in zip(rendered, rows, strict=True)]

    def _result(self, rendered: RenderedRow | RowRefused, row: Row) -> _Result:
        if isinstance(rendered, RowRefused):
            return _Result([], 0, refused=(rendered.reason, rendered.detail))
        size, turns = rendered.length, (rendered.unlearned, rendered.left_out)
        if rendered.length <= self.length:
            return _Result([_numbers(rendered)], size, *turns)
        pieces = self._cut(rendered, row)
        if pieces:
            return _Result(pieces, size, *turns, cut=len(pieces) == 1)
        how = "" if pieces is None else ", nothing learned within the limit"
        return _Result([], size, refused=(TOO_LONG, f"{size} tokens{how}"))

    def _cut(self, rendered: RenderedRow, row: Row) -> list[Piece] | None:
        """Pieces that have something to learn; None where the row is to be dropped."""
        ids, labels = _numbers(rendered)
        how, size = self.too_long, self.length
        if how == "auto" or (isinstance(row, Text) and self.pack):
            how = "split" if isinstance(row, Text) else "drop"
        if how == "drop":
            return None
        if self.encoder_decoder:
            # An encoder's prompt and a decoder's answer are cut each by itself; there are no pieces of a pair.
            ends = slice(None, size) if how != "cut_left" else slice(-size, None)
            return [(ids[ends], labels[:size])]
        spans = {
            "cut_right": [slice(0, size)],
            "cut_left": [slice(len(ids) - size, None)],
            "split": [slice(start, start + size) for start in range(0, len(ids), size)],
        }[how]
        cut = [(ids[span], labels[span]) for span in spans]
        # The first token of a sequence is predicted from nothing.
        return [piece for piece in cut if (piece[1][1:] != IGNORED).any()]


def _numbers(rendered: RenderedRow) -> Piece:
    return np.array(rendered.input_ids, np.int32), np.array(rendered.labels, np.int32)


def _rendered(batches: Iterator[list[Row]], work: _Work, workers: int) -> Iterator[_Result]:
    """Results in order, from several processes where that is worth it; few batches are on their way at a time."""
    if workers < 2:
        for batch in batches:
            yield from work(batch)
        return
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_begin, initargs=(work,)
    ) as pool:
        waiting: collections.deque[Future[list[_Result]]] = collections.deque()
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 3 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


_PROCESS: list[_Work] = []
"""What a process of the pool does."""


def _begin(work: _Work) -> None:
    # A process for each core: threads of the tokenizers' own would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _PROCESS[:] = [work]


def _work(batch: list[Row]) -> list[_Result]:
    return _PROCESS[0](batch)
