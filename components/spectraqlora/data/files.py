"""Files of rows: each kind read by its own rules, a row at a time, and no type is guessed.

| kind | a row is | its number |
| --- | --- | --- |
| .jsonl, .ndjson | a line, an object of JSON; or as .json, where the file is a list | the line's |
| .json | an object of the list, or of those one after the other; a list may be the only one in an object | its place |
| .csv, .tsv | a record below the header; every field is text | its place |
| .parquet, .arrow | a row with the types that the file declares | its place |
| .txt | what blank lines part; a line, where there are none | its first line's |
| .md | the file | 1 |

Each but .parquet and .arrow may be compressed as .gz, .zst or .xz. Text is UTF-8, UTF-16 or UTF-32 by a byte order mark,
else what `data.encoding` says.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TextIO, cast

from spectraqlora.errors import InputError
from spectraqlora.places import COMPRESSED_SUFFIXES, DATA_SUFFIXES

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""In this order: UTF-32's little-endian mark begins as UTF-16's."""
_DELIMITERS = ",;\t|"
_SNIFFED_RECORDS = 20
_CHARACTERS = 1 << 20
_UNMARKED = re.compile(rb"(?:[^\0]\0){4}|(?:\0[^\0]){4}", re.DOTALL)
"""How western text begins in UTF-16 without its mark: as UTF-8 it would be text with a NUL between letters."""
_BATCH_ROWS = 1000
_BUFFER = 1 << 20
"""Bytes of a Parquet column that are read at a time."""
_WHITE = re.compile(r"[ \t\r\n]*")

Record = dict[str, Any]
"""Value by column: str, `Number`, bool, None, list, dict; from Parquet and Arrow also what their types are in Python."""


class Number(str):
    """A number of JSON, as the file writes it: 1.50 stays 1.50."""

    __slots__ = ()

    def plain(self) -> int | float:
        """The number itself."""
        try:
            return int(self)
        except ValueError:
            return float(self)


@dataclass(frozen=True)
class DataFile:
    """One file of rows.

    Args:
        name: what errors call it.
        suffix: its kind, one of `DATA_SUFFIXES`.
        compression: one of `COMPRESSED_SUFFIXES`, or empty.
        open_bytes: opens it for reading, at its beginning.
        source: place of its source among `data.sources`.
    """

    name: str
    suffix: str
    compression: str
    open_bytes: Callable[[], BinaryIO]
    source: int = 0


def suffixes(name: str) -> tuple[str, str]:
    """(kind, compression) of a file by its name, in lower case; the kind is empty where it is none of data."""
    path = PurePosixPath(name.lower())
    compression = path.suffix if path.suffix in COMPRESSED_SUFFIXES else ""
    kind = PurePosixPath(path.stem).suffix if compression else path.suffix
    known = kind in DATA_SUFFIXES and not (compression and kind in (".parquet", ".arrow"))
    return (kind, compression) if known else ("", compression)


def read_rows(
    file: DataFile, encoding: str = "utf-8", wanted: Iterable[str] = ()
) -> Iterator[tuple[int, Record]]:
    """(number, row) of every row, one at a time.

    Args:
        file: to read.
        encoding: of text without a byte order mark.
        wanted: columns that a header is looked for by; they tell delimiters apart.

    Raises:
        InputError: the file is damaged, cut short, in another encoding, or not of its kind.
    """
    readers: dict[str, Callable[[], Iterator[tuple[int, Record]]]] = {
        ".jsonl": lambda: _json(file, encoding, set(wanted)),
        ".ndjson": lambda: _json(file, encoding, set(wanted)),
        ".json": lambda: _documents(file, encoding, set(wanted)),
        ".csv": lambda: _table(file, encoding, set(wanted)),
        ".tsv": lambda: _table(file, encoding, set(wanted)),
        ".txt": lambda: _paragraphs(file, encoding),
        ".md": lambda: _document(file, encoding),
        ".parquet": lambda: _parquet(file),
        ".arrow": lambda: _arrow(file),
    }
    try:
        yield from readers[file.suffix]()
    except UnicodeDecodeError as error:
        if codecs.lookup(error.encoding).name != codecs.lookup(encoding).name:
            raise InputError(
                file.name, "bytes that are no text", f"{error.encoding.upper()}, as its first bytes say"
            ) from None
        line = _undecodable_line(file, encoding)
        raise InputError(
            f"{file.name}, line {line}" if line else file.name,
            "bytes of another encoding",
            f"text in {encoding.upper()}; Windows' western one is set by data.encoding=cp1252",
        ) from None
    except UnicodeError:
        raise InputError(file.name, "bytes of another encoding", "UTF-16 or UTF-32, complete") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error):
        raise _damaged(file) from None


def _damaged(file: DataFile) -> InputError:
    return InputError(
        "data.source", file.name, f"a complete file of the kind {file.compression or file.suffix}"
    )


def _plain_bytes(file: DataFile) -> BinaryIO:
    """The file's bytes, decompressed as they are read."""
    raw = file.open_bytes()
    if file.compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if file.compression == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if file.compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstandard(raw, file)))
    return raw


class _Zstandard(io.RawIOBase):
    """Bytes of Zstandard frames, which Arrow decompresses."""

    def __init__(self, raw: BinaryIO, file: DataFile) -> None:
        import pyarrow as pa

        self._file = file
        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            chunk = self._stream.read(len(buffer))
        except OSError:
            raise _damaged(self._file) from None
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _text(file: DataFile, encoding: str) -> TextIO:
    """The file's text; its line breaks are left as they are, and only \\n ends a line."""
    stream = io.BufferedReader(cast(Any, _plain_bytes(file)))
    head = stream.peek(8)[:8]
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), encoding)
    if _UNMARKED.match(head) and b"\0" not in "a".encode(marked):
        raise InputError(
            file.name,
            "bytes that are no text",
            f"text in {marked.upper()}; UTF-16 without a byte order mark is set by data.encoding=utf-16-le",
        )
    return io.TextIOWrapper(stream, marked, newline="\n")


def _undecodable_line(file: DataFile, encoding: str) -> int:
    """The first line that is not in the encoding; 0 where lines do not tell."""
    with _plain_bytes(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 0


class _Twice(Exception):
    """A key that an object has twice: of JSON's readers most take the last value, and the other would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return record


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(
        parse_int=Number, parse_float=Number, parse_constant=float, object_pairs_hook=_object
    )


def _json(file: DataFile, encoding: str, wanted: set[str]) -> Iterator[tuple[int, Record]]:
    """Lines; or, whatever the file is called, one list."""
    with _text(file, encoding) as stream:
        first = next((line for line in stream if line.strip("\ufeff \t\r\n")), "")
    listed = first.lstrip("\ufeff \t").startswith("[")
    return _documents(file, encoding, wanted) if listed else _json_lines(file, encoding)


def _documents(file: DataFile, encoding: str, wanted: set[str]) -> Iterator[tuple[int, Record]]:
    """The rows of `_json_documents`; of one object around a list of them, those of the list."""
    rows = _json_documents(file, encoding)
    first, second = next(rows, None), next(rows, None)
    if first is not None and second is None:
        inner = _inner_rows(file.name, first[1], wanted)
        if inner is not None:
            yield from enumerate(inner, 1)
            return
    yield from (row for row in (first, second) if row is not None)
    yield from rows


def _inner_rows(name: str, row: Record, wanted: set[str]) -> list[Record] | None:
    """The only list of objects in an object that is no row itself.

    Raises:
        InputError: there are several.
    """
    lists = {
        key: value
        for key, value in row.items()
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
    }
    if not lists or wanted & row.keys():
        return None
    if len(lists) > 1:
        files = ", ".join(f"{key}.json" for key in lists)
        raise InputError(name, ", ".join(lists), f"one list of rows; several are a folder with {files}")
    return next(iter(lists.values()))


def _json_lines(file: DataFile, encoding: str) -> Iterator[tuple[int, Record]]:
    decode = _decoder().decode
    with _text(file, encoding) as stream:
        for number, line in enumerate(stream, 1):
            # Files that were put together have marks within.
            line = line.lstrip("\ufeff")
            if not line.strip():
                continue
            try:
                row = decode(line)
            except (ValueError, RecursionError):
                row = None
            except _Twice as key:
                raise _twice(f"{file.name}, line {number}", key) from None
            if not isinstance(row, dict):
                raise InputError(f"{file.name}, line {number}", line.strip()[:60], "one JSON object per line")
            _check_text(f"{file.name}, line {number}", line, row)
            yield number, row


def _check_text(where: str, written: str, row: Record) -> None:
    """Refuse halves of characters: JSON can write them, as \\ud800, and no tokenizer takes them (InputError)."""
    if "\\u" not in written:
        return
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            where,
            str(error.object)[error.start : error.end].encode("ascii", "backslashreplace").decode(),
            "characters; it is half of a surrogate pair",
        ) from None


def _json_documents(file: DataFile, encoding: str) -> Iterator[tuple[int, Record]]:
    """The objects of one list, or those that follow one another, each decoded when the text holds it."""
    decode = _decoder().raw_decode
    text, at, number, listed, between = "", 0, 0, False, False
    with _text(file, encoding) as stream:
        while True:
            at = cast(Any, _WHITE.match(text, at)).end()
            if at == len(text):
                text, at = stream.read(_CHARACTERS), 0
                if not text:
                    break
                continue
            if text[at] == "[" and not number and not listed:
                listed, at = True, at + 1
            elif text[at] == "]" and listed and (between or not number):
                if text[at + 1 :].strip() or stream.read().strip():
                    raise InputError("data.source", file.name, "one JSON list and nothing after it")
                return
            elif text[at] == "," and between and listed:
                between, at = False, at + 1
            else:
                try:
                    begin, (row, at) = at, decode(text, at)
                except _Twice as key:
                    raise _twice(f"{file.name}, row {number + 1}", key) from None
                except (ValueError, RecursionError):
                    # Cut within a value, most likely.
                    part = stream.read(max(_CHARACTERS, len(text)))
                    if not part:
                        raise _no_object(file, number, text[at:]) from None
                    text, at = text[at:] + part, 0
                    continue
                number, between = number + 1, True
                if not isinstance(row, dict):
                    raise _no_object(file, number - 1, str(row))
                _check_text(f"{file.name}, row {number}", text[begin:at], row)
                yield number, row
    if listed:
        raise InputError("data.source", file.name, "a complete JSON list; it is cut short")


def _twice(where: str, key: _Twice) -> InputError:
    return InputError(where, str(key), "keys that are different; this one is there twice")


def _no_object(file: DataFile, before: int, text: str) -> InputError:
    expected = "a JSON list of objects, or an object after the other"
    return InputError(f"{file.name}, row {before + 1}", text[:60], expected)


def _table(file: DataFile, encoding: str, wanted: set[str]) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(2**31 - 1)
    quoted = file.suffix != ".tsv" or _is_quoted(file, encoding)
    with _text(file, encoding) as stream:
        # An Excel that saves with semicolons may say so in a first line of its own.
        first = stream.readline()
        said = first.rstrip("\r\n") if first.lower().startswith("sep=") else ""
        head = [] if said else [first]
        head += list(itertools.islice(stream, _SNIFFED_RECORDS))
        lines = itertools.chain(head, stream)
        guessed = "\t" if file.suffix == ".tsv" else _delimiter(head, wanted)
        delimiter = (said[4:5] or ",") if said else guessed
        records = _records(lines, delimiter, quoted)
        number = 0
        try:
            header = [name.strip() for name in next((record for record in records if record), [])]
            named = [name for name in header if name]
            if len(set(named)) < len(named):
                raise InputError(
                    file.name, delimiter.join(header), "a header whose columns have different names"
                )
            for record in records:
                if not record:
                    continue
                number += 1
                if len(record) > len(header):
                    raise InputError(
                        f"{file.name}, row {number}",
                        delimiter.join(record)[:60],
                        f"{len(header)} fields, as the header has",
                    )
                # Fields that are empty at a record's end may be left out.
                yield number, dict(itertools.zip_longest(header, record, fillvalue=""))
        except csv.Error as error:
            raise InputError(
                f"{file.name}, row {number + 1}",
                str(error).partition(" - ")[0],
                "a record of CSV; lines end with \\n or \\r\\n, and a field with a line break or quote is in quotes",
            ) from None


def _records(lines: Iterable[str], delimiter: str, quoted: bool) -> Iterator[list[str]]:
    if quoted:
        return csv.reader(lines, delimiter=delimiter, strict=True)
    return (line.rstrip("\r\n").split(delimiter) if line.strip("\r\n") else [] for line in lines)


def _is_quoted(file: DataFile, encoding: str) -> bool:
    """Whether quotes at the ends of a field are none of its text: they add up, in every record of the header's length."""
    with _text(file, encoding) as stream:
        try:
            lengths = {len(record) for record in csv.reader(stream, delimiter="\t", strict=True) if record}
        except csv.Error:
            return False
    return len(lengths) <= 1


def _delimiter(head: list[str], wanted: set[str]) -> str:
    """The one that splits the header into columns that are wanted; else the one that splits most, and evenly."""

    def merit(delimiter: str) -> tuple[bool, bool, int]:
        try:
            records = [r for r in csv.reader(head, delimiter=delimiter) if r]
        except csv.Error:
            return False, False, 0
        header = records[0] if records else []
        # The last record may be cut within its quotes.
        even = len(header) > 1 and all(len(record) == len(header) for record in records[:-1])
        return len(wanted & set(header)) > 0 and len(header) > 1, even, len(header)

    return max(_DELIMITERS, key=merit)


def _paragraphs(file: DataFile, encoding: str) -> Iterator[tuple[int, Record]]:
    with _text(file, encoding) as stream:
        parted = any(not line.strip() for line in _without_last_blanks(stream))
    with _text(file, encoding) as stream:
        start, lines = 0, ""
        for number, line in enumerate(stream, 1):
            if line.strip():
                start = start if lines else number
                lines += line
            if lines and (not parted or not line.strip()):
                yield start, {"text": lines.rstrip("\r\n")}
                lines = ""
        if lines:
            yield start, {"text": lines.rstrip("\r\n")}


def _without_last_blanks(lines: Iterable[str]) -> Iterator[str]:
    """Lines from the first one that is not blank to the last."""
    blanks: list[str] = []
    begun = False
    for line in lines:
        if line.strip():
            yield from blanks
            blanks, begun = [], True
            yield line
        elif begun and not blanks:
            blanks.append(line)


def _document(file: DataFile, encoding: str) -> Iterator[tuple[int, Record]]:
    with _text(file, encoding) as stream:
        text = stream.read()
    if text.strip():
        yield 1, {"text": text}


def _parquet(file: DataFile) -> Iterator[tuple[int, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open_bytes() as raw:
        try:
            yield from _batches(
                pq.ParquetFile(raw, pre_buffer=False, buffer_size=_BUFFER).iter_batches(_BATCH_ROWS)
            )
        except (pa.ArrowException, OSError):
            raise InputError("data.source", file.name, "a readable Parquet file") from None


def _arrow(file: DataFile) -> Iterator[tuple[int, Record]]:
    import pyarrow as pa

    with file.open_bytes() as raw:
        try:
            if raw.read(6) == b"ARROW1":
                raw.seek(0)
                opened = pa.ipc.open_file(raw)
                batches: Iterable[Any] = (opened.get_batch(i) for i in range(opened.num_record_batches))
            else:
                raw.seek(0)
                batches = pa.ipc.open_stream(raw)
            yield from _batches(batches)
        except (pa.ArrowException, OSError):
            raise InputError("data.source", file.name, "a readable Arrow file, complete") from None


def _batches(batches: Iterable[Any]) -> Iterator[tuple[int, Record]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            part = batch.slice(start, _BATCH_ROWS)
            columns = [_values(column) for column in part.columns]
            for values in zip(*columns, strict=True) if columns else ():
                number += 1
                yield number, dict(zip(part.schema.names, values, strict=True))


def _values(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_floating(column.type) and not pa.types.is_float64(column.type):
        # As Python's own float, 0.1 in 4 bytes would be 0.10000000149011612.
        return [None if v is None else Number(str(v)) for v in _narrow_floats(column)]
    return cast(list[Any], column.to_pylist())


def _narrow_floats(column: Any) -> list[Any]:
    known = column.is_valid().to_pylist()
    return [value if there else None for value, there in zip(column.to_numpy(False), known, strict=True)]
