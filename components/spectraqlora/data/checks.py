"""What can be known of data before a run: files, layouts, counts, and how the model's template renders it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spectraqlora.data.accounting import Counter
from spectraqlora.data.conversations import ROLES
from spectraqlora.data.for_model import RowModel
from spectraqlora.data.rows import Conversation, Origin, Row, RowRefused
from spectraqlora.data.sources import Source, look_at_sources
from spectraqlora.data.splits import Split, side_sizes
from spectraqlora.errors import InputError
from spectraqlora.places import Place
from spectraqlora.settings import DataSettings

LOCAL_ROWS = 200_000
"""So many rows of a source on this machine are read before a run."""
_REMOTE_ROWS, _REMOTE_FILES = 20, 8
"""So many rows are read of so many files that would have to be fetched."""
_FIRST_ROWS, _PATTERNS = 3, 64


def check_sources(
    places: Sequence[Place], settings: DataSettings, model: RowModel | None = None
) -> list[str]:
    """Refuse bad data: missing, empty, unknown columns, values that are no text, nothing left to hold out.

    With a model, the first rows of every file and a row of every pattern of roles are rendered. Of files that are
    elsewhere only the first rows are read.

    Args:
        places: of the sources.
        settings: the `data` section.
        model: that renders rows.

    Returns:
        A line for every kind of row that the model's template refuses, where it takes others.

    Raises:
        InputError: what is wrong with it.
    """
    source = look_at_sources(places, settings)
    if source is None:
        return []
    local = all(place.kind == "path" for place in places)
    named = ", ".join(map(str, places))
    counter, rows, total, complete = Counter(), [], 0, True
    patterns: set[object] = set()
    for split in source.splits:
        kept, left = 0, LOCAL_ROWS
        for origins, file_rows in _files(source, settings, split, local):
            read, first = 0, 0
            for row in itertools.islice(file_rows, left if local else _REMOTE_ROWS):
                read += 1
                if isinstance(row, tuple):
                    counter.drop(row[1].reason, row[0], row[1].detail)
                    continue
                kept += 1
                pattern = _pattern(row)
                if first < _FIRST_ROWS or (pattern not in patterns and len(patterns) < _PATTERNS):
                    rows.append(row)
                    patterns.add(pattern)
                    first += 1
            if not read:
                raise InputError("data.source", origins, "rows; it has none")
            left -= read
        complete = complete and local and left > 0
        if split == "train":
            total = kept
    if complete:
        if not total:
            raise InputError("data.source", named, f"rows to learn from; of all rows: {counter.reasons()}")
        side_sizes(min(total, settings.max_rows or total), settings, source.splits)
    return _check_rendering(named, rows, model) if model else []


def _files(
    source: Source, settings: DataSettings, split: Split, local: bool
) -> Iterator[tuple[str, Iterator[Row | tuple[Origin, RowRefused]]]]:
    files = source.splits[split]
    for file in files if local else files[:_REMOTE_FILES]:
        yield file.name, Source({split: [file]}).rows(settings, split)


def _pattern(row: Row) -> object:
    """What distinguishes rows to a template: who speaks in turn, and whether tools are there."""
    if not isinstance(row, Conversation):
        return type(row).__name__
    roles = [m["role"] for m in row.messages]
    # A longer exchange of the same two is no other pattern.
    turns = [role for role, before in zip(roles, [None, None, *roles], strict=False) if role != before]
    return (
        tuple(turns[:6]),
        row.tools is not None,
        any("tool_calls" in m for m in row.messages),
        any("reasoning_content" in m for m in row.messages),
        set(roles) <= set(ROLES.values()),
    )


def _check_rendering(named: str, rows: list[Row], model: RowModel) -> list[str]:
    counter, fine = Counter(), 0
    for row, rendered in zip(rows, model.renderer.render_all(rows), strict=True):
        if isinstance(rendered, RowRefused):
            counter.drop(rendered.reason, row.origin, rendered.detail)
        else:
            fine += 1
    if rows and not fine:
        entry = max(counter.dropped.values(), key=lambda dropped: dropped.rows)
        raise InputError(
            entry.first, entry.reason, f"rows that the base model renders; none of {named} is one"
        )
    return [
        f"{entry.reason}: rows such as {entry.first}; they will be dropped, and counted"
        for entry in counter.dropped.values()
    ]
