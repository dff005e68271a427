"""The one reader of safetensors headers, wherever a file is: every promise of a header is checked before it is used.

A file is an 8-byte length n, a JSON object of n bytes that says where each tensor is, and the tensors' bytes:

    {"model.norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}, …}
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from spectraqlora.errors import InputError

LONGEST_HEADER = 100_000_000
"""Bytes; what the safetensors library accepts."""
_HEAD_BYTES = 1 << 16
_METADATA = "__metadata__"


class StoredType(NamedTuple):
    """A type of numbers: its name in torch, empty where torch has none, and the bits of one number."""

    torch: str
    bits: int


TYPES = {
    "F64": StoredType("float64", 64),
    "F32": StoredType("float32", 32),
    "F16": StoredType("float16", 16),
    "BF16": StoredType("bfloat16", 16),
    "F8_E4M3": StoredType("float8_e4m3fn", 8),
    "F8_E5M2": StoredType("float8_e5m2", 8),
    "F8_E8M0": StoredType("float8_e8m0fnu", 8),
    "F4": StoredType("", 4),
    "C64": StoredType("complex64", 64),
    "I64": StoredType("int64", 64),
    "I32": StoredType("int32", 32),
    "I16": StoredType("int16", 16),
    "I8": StoredType("int8", 8),
    "U64": StoredType("uint64", 64),
    "U32": StoredType("uint32", 32),
    "U16": StoredType("uint16", 16),
    "U8": StoredType("uint8", 8),
    "BOOL": StoredType("bool", 8),
}
"""What a header calls a type, as the safetensors library defines it."""


class Entry(NamedTuple):
    """One tensor of a file: type, shape, and its bytes' begin and end, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


class Header(NamedTuple):
    """The tensors of a file by name, and the byte of the file at which the first of them begins."""

    entries: dict[str, Entry]
    data: int


def read_header(read: Callable[[int, int], bytes | bytearray], size: int, where: object) -> Header:
    """A safetensors file's header, held against the file's size.

    Args:
        read: the bytes from an offset, so many of them.
        size: of the file in bytes.
        where: the file, as messages name it.

    Raises:
        InputError: it is cut short, is no header, or says of a tensor what cannot be: an unknown type, a negative
            size, bytes that are not there, that do not fit its shape, or that another tensor has as well.
    """
    head = bytes(read(0, min(_HEAD_BYTES, size)))
    if len(head) < 8:
        raise _refused(where, "a complete safetensors file; its header is cut short")
    (length,) = struct.unpack_from("<Q", head)
    if length > min(size - 8, LONGEST_HEADER):
        raise _refused(where, "a complete safetensors file; its header is cut short")
    if 8 + length > len(head):
        head += bytes(read(len(head), 8 + length - len(head)))
    entries = _entries(head[8 : 8 + length], where)
    end = _check_layout(entries, where)
    if size != 8 + length + end:
        fault = "truncated" if size < 8 + length + end else "longer than that"
        raise _refused(where, f"{8 + length + end} bytes; it is {fault} at {size}")
    return Header(entries, 8 + length)


def read_local_header(path: Path) -> Header:
    """The header of a safetensors file on disk.

    Raises:
        InputError: no such file, or one that `read_header` refuses.
    """
    try:
        with open(path, "rb") as stream:

            def read(offset: int, length: int) -> bytes:
                stream.seek(offset)
                return stream.read(length)

            return read_header(read, path.stat().st_size, path)
    except OSError as error:
        raise _refused(path, f"a file that can be read ({error.strerror})") from None


def _entries(text: bytes, where: object) -> dict[str, Entry]:
    try:
        document = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError):
        raise _refused(
            where, "a complete safetensors file; its header is no JSON object of tensors"
        ) from None
    if not isinstance(document, dict):
        raise _refused(where, "a complete safetensors file; its header is no JSON object of tensors")
    document.pop(_METADATA, None)
    return {name: parsed_entry(name, described, where) for name, described in document.items()}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name twice")
    return document


def parsed_entry(name: str, described: Any, where: object) -> Entry:
    """One tensor as a header describes it, checked by itself (InputError)."""
    if not isinstance(described, Mapping):
        raise _tensor_refused(where, name, "dtype, shape and data_offsets")
    dtype, shape, offsets = described.get("dtype"), described.get("shape"), described.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise _tensor_refused(where, name, f"one of the types {', '.join(TYPES)}, and not {dtype!r}")
    if not _sizes(shape):
        raise _tensor_refused(
            where, name, f"a shape of whole numbers that are not negative, and not {shape!r}"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _tensor_refused(
            where, name, f"two offsets, the first not above the second, and not {offsets!r}"
        )
    entry = Entry(dtype, tuple(shape), offsets[0], offsets[1])
    needed, has = entry.numbers * TYPES[dtype].bits, 8 * (entry.end - entry.begin)
    if needed != has:
        raise _tensor_refused(
            where, name, f"{-(-needed // 8)} bytes, as its shape {shape} of {dtype} says; it has {has // 8}"
        )
    return entry


def _sizes(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (list, tuple)) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value
    )


def _check_layout(entries: dict[str, Entry], where: object) -> int:
    """Refuse tensors that overlap, and bytes that belong to none; returns where the last tensor ends."""
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise _tensor_refused(where, name, f"bytes of its own; they overlap with those of {before}")
        if entry.begin > end:
            raise _tensor_refused(
                where,
                name,
                f"its bytes to begin at {end}, where those before end; they begin at {entry.begin}",
            )
        end, before = entry.end, name
    return end


def _refused(where: object, expected: str) -> InputError:
    return InputError("safetensors file", where, expected)


def _tensor_refused(where: object, name: str, expected: str) -> InputError:
    shown = name if len(name) <= 120 else name[:117] + "..."
    return InputError("safetensors file", where, f"of tensor {shown!r} {expected}")
