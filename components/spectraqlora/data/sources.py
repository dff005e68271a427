"""Data sources: files, folders and hub ids; what is wrong with them is said before long work."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spectraqlora.data.layouts import recognise
from spectraqlora.data.splits import split_sizes
from spectraqlora.errors import InputError
from spectraqlora.places import DATA_SUFFIXES, Place
from spectraqlora.settings import DataSettings
from spectraqlora.storage import open_files

_HEAD_BYTES = 1 << 20


def load_source(place: Place, settings: DataSettings, content: str = "") -> Any:
    """All rows of the source as a `datasets.Dataset`.

    Args:
        place: of the data.
        settings: the `data` section.
        content: what an s3:// address must hold, or the commit of a hub id; empty takes what is there.

    Raises:
        InputError: the source is missing, malformed, changed since, or its rows are not of one shape.
    """
    from datasets import load_dataset

    if place.kind == "hub":
        name = place.with_owner()
        try:
            return load_dataset(name, split=settings.split, revision=content or None)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError("data.source", place, f"a hub data set that loads ({first})") from None
    files = _files(place.local_copy(content))
    _check_files(files, settings)
    try:
        return load_dataset(_loader(files[0]), data_files=[str(file) for file in files], split="train")
    except Exception as error:
        first = (str(error.__cause__ or error).splitlines() or [""])[0]
        raise InputError("data.source", place, f"rows of one shape ({first})") from None


def check_source(place: Place, settings: DataSettings) -> None:
    """Refuse a bad source: missing, empty, not JSON, unknown columns, no rows left to hold out.

    Of files at an s3:// address only names, sizes and the first row are read; data on the hub is not asked for.

    Raises:
        InputError: what is wrong with it.
    """
    if place.kind == "s3":
        _check_remote(place)
    elif place.kind == "path":
        _check_files(_files(place.path), settings)


def _loader(file: Path) -> str:
    """Name of the `datasets` loader of a file."""
    return "json" if file.suffix == ".jsonl" else file.suffix.removeprefix(".")


def _files(path: Path) -> list[Path]:
    """The data files of a file or folder; refuses what is empty or of unknown kind."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in DATA_SUFFIXES)
        _check_kinds(path, {_loader(file) for file in files})
    else:
        files = [path]
        if path.suffix not in DATA_SUFFIXES:
            raise InputError("data.source", path, f"one of {', '.join(DATA_SUFFIXES)}, a folder or a hub id")
    for file in files:
        if file.stat().st_size == 0:
            raise InputError("data.source", file, "rows; the file is empty")
    return files


def _check_files(files: list[Path], settings: DataSettings) -> None:
    total = 0
    for file in files:
        columns, count = _columns_and_count(file)
        if count == 0:
            raise InputError("data.source", file, "rows; it has none")
        recognise(columns)
        total += count
    split_sizes(total, settings)


def _check_kinds(source: object, loaders: set[str]) -> None:
    if not loaders:
        raise InputError("data.source", source, f"a folder with {', '.join(DATA_SUFFIXES)} files")
    if len(loaders) > 1:
        raise InputError("data.source", source, "a folder with files of one kind")


def _check_remote(source: Place) -> None:
    readers = open_files(source.address)
    files = {name: r for name, r in readers.items() if Path(name).suffix in DATA_SUFFIXES and "/" not in name}
    _check_kinds(source, {_loader(Path(name)) for name in files})
    for name, reader in files.items():
        if reader.size == 0:
            raise InputError("data.source", f"{source}: {name}", "rows; the file is empty")
    name, reader = next(iter(files.items()))
    first, line_break, _ = bytes(reader.read(0, min(reader.size, _HEAD_BYTES))).strip().partition(b"\n")
    if not line_break and reader.size > _HEAD_BYTES:
        return
    try:
        if name.endswith(".jsonl"):
            recognise(list(json.loads(first)))
        elif name.endswith(".csv"):
            recognise(next(csv.reader([first.decode()]), []))
    except (ValueError, TypeError):
        raise InputError("data.source", f"{source}: {name}", "one JSON object per line, in UTF-8") from None


def _json_rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}", line.strip()[:60], "one JSON object per line")
                yield row
        return
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("data.source", path, f"valid JSON ({error})") from None
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise InputError("data.source", path, "a JSON list of objects")
    yield from document


def _columns_and_count(path: Path) -> tuple[list[str], int]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            meta = pq.ParquetFile(path)
        except (pa.ArrowException, OSError):
            raise InputError("data.source", path, "a readable Parquet file") from None
        return list(meta.schema_arrow.names), int(meta.metadata.num_rows)
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as stream:
            reader = csv.reader(stream)
            return next(reader, []), sum(1 for _ in reader)
    columns: list[str] = []
    count = 0
    try:
        for row in _json_rows(path):
            columns = columns or list(row)
            count += 1
    except UnicodeDecodeError:
        raise InputError("data.source", path, "UTF-8 text") from None
    return columns, count
