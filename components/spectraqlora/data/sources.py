"""Data sources: files, folders and hub ids; what is wrong with them is said before long work."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spectraqlora.data.layouts import recognise
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings, is_address
from spectraqlora.storage import local_copy, open_files, parse_address

_HEAD_BYTES = 1 << 20
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def is_hub_id(source: str) -> bool:
    """Whether a source can only be a hub id: no such path, one slash or none, no file suffix."""
    return (
        not is_address(source)
        and not Path(source).exists()
        and Path(source).suffix not in LOADERS
        and source[:1] not in (".", "/", "~")
    )


def local_source(source: str, content: str = "") -> str:
    """A source on this machine: itself, or a copy of an s3:// address that holds `content`."""
    return str(local_copy(parse_address(source, "data.source"), content)) if is_address(source) else source


def files_of(source: str) -> list[Path]:
    """The data files of a file or folder; refuses what is missing, empty or of unknown kind."""
    path = Path(source)
    if not path.exists():
        raise InputError("data.source", source, "an existing file or folder, or a hub id")
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in LOADERS)
        _check_kinds(source, {p.suffix for p in files})
    else:
        files = [path]
        if path.suffix not in LOADERS:
            raise InputError("data.source", source, f"one of {', '.join(LOADERS)}, a folder or a hub id")
    for file in files:
        if file.stat().st_size == 0:
            raise InputError("data.source", file, "rows; the file is empty")
    return files


def _check_kinds(source: str, suffixes: set[str]) -> None:
    if not suffixes:
        raise InputError("data.source", source, f"a folder with {', '.join(LOADERS)} files")
    if len({LOADERS[suffix] for suffix in suffixes}) > 1:
        raise InputError("data.source", source, "a folder with files of one kind")


def _check_remote(source: str) -> None:
    readers = open_files(parse_address(source, "data.source"))
    files = {name: r for name, r in readers.items() if Path(name).suffix in LOADERS and "/" not in name}
    _check_kinds(source, {Path(name).suffix for name in files})
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


def split_sizes(rows: int, settings: DataSettings) -> tuple[int, int]:
    """(train rows, eval rows) of a number of rows; refuses splits that leave either side empty."""
    if settings.max_rows:
        rows = min(rows, settings.max_rows)
    held_out = min(round(rows * settings.eval_fraction), settings.max_eval_rows)
    if held_out < 1 or rows - held_out < 1:
        raise InputError(
            "data.eval_fraction",
            settings.eval_fraction,
            f"a share that leaves rows on both sides of {rows} rows",
        )
    return rows - held_out, held_out


def check_source(settings: DataSettings) -> None:
    """Refuse a bad source: missing, empty, not JSON, unknown columns, no rows left to evaluate on.

    Of files at an s3:// address only names, sizes and the first row are looked at.
    """
    if is_hub_id(settings.source):
        return
    if is_address(settings.source):
        _check_remote(settings.source)
        return
    total = 0
    for path in files_of(settings.source):
        columns, count = _columns_and_count(path)
        if count == 0:
            raise InputError("data.source", path, "rows; it has none")
        recognise(columns)
        total += count
    split_sizes(total, settings)
