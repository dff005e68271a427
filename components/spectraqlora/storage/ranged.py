"""Reading parts of objects without a copy on disk, and model checkpoints that way."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from spectraqlora.checkpoint import Tensors
from spectraqlora.errors import InputError
from spectraqlora.storage.address import Address
from spectraqlora.storage.connection import Connection
from spectraqlora.storage.folders import StoredFile, find_file, read_folder, single_file
from spectraqlora.storage.parallel import run_all

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_HEAD_BYTES = 1 << 16
_LONGEST_HEADER = 100_000_000
"""Bytes; what the safetensors library accepts."""
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class RangedReader:
    """Random access to one object; every read is of the object that was opened.

    A part of an object cannot be held against the SHA-256 of the whole: what is checked is that size and
    ETag stay the same.
    """

    def __init__(self, connection: Connection, file: StoredFile) -> None:
        self._connection, self._file = connection, file
        self.size = file.size

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes from an offset, fetched in parallel parts; memory: the result and at most workers x 1 MiB.

        Raises:
            InputError: a range outside the object, a changed object, or a store that refuses.
        """
        file, step = self._file, self._connection.part_bytes
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InputError("s3 object", file.object, f"{offset + length} bytes; it has {self.size}")
        content = bytearray(length)
        view = memoryview(content)

        def keep(position: int, chunk: bytes) -> None:
            start = position - offset
            view[start : start + len(chunk)] = chunk

        fetch = functools.partial(self._connection.read_range, file.object, sink=keep, etag=file.etag)
        jobs = [
            functools.partial(fetch, start, min(step, offset + length - start))
            for start in range(offset, offset + length, step)
        ]
        if len(jobs) == 1:
            jobs[0]()
        else:
            run_all(jobs, self._connection.workers)
        return content


def ranged_reader(address: Address, connection: Connection | None = None) -> RangedReader:
    """Open one object for reading at any offset.

    Raises:
        InputError: no such object, or a store that refuses.
    """
    connection = connection or Connection()
    return RangedReader(connection, find_file(connection, address))


def open_files(address: Address, connection: Connection | None = None) -> dict[str, RangedReader]:
    """Readers of a folder's files by name, or of the one object of this key.

    Raises:
        InputError: nothing there, an unfinished upload, or a store that refuses.
    """
    connection = connection or Connection()
    file = single_file(connection, address)
    files = [file] if file is not None else read_folder(connection, address)[1]
    return {file.name: RangedReader(connection, file) for file in files}


class _Shard:
    """One safetensors object: its reader, and its header's entries."""

    def __init__(self, reader: RangedReader, where: Address) -> None:
        self.reader = reader
        head = reader.read(0, min(_HEAD_BYTES, reader.size))
        try:
            (length,) = struct.unpack_from("<Q", head)
            if length > min(reader.size - 8, _LONGEST_HEADER):
                raise ValueError
            if 8 + length > len(head):
                head += reader.read(len(head), 8 + length - len(head))
            entries: dict[str, dict[str, Any]] = json.loads(head[8 : 8 + length])
            entries.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                "safetensors object", where, "a whole safetensors file; its header is cut short"
            ) from None
        self.data = 8 + length
        if reader.size != self.data + end:
            raise InputError(
                "safetensors object", where, f"{self.data + end} bytes; it is truncated at {reader.size}"
            )
        self.entries = entries


class S3Checkpoint(Tensors):
    """Tensors of a model folder in object storage, one at a time, without a copy on disk.

    Opening reads the shards' headers only; loading one reads its own bytes.

    Raises:
        InputError: no safetensors there, a shard that the index names and that is missing, a malformed or
            truncated shard, or a store that refuses.
    """

    def __init__(self, address: Address, connection: Connection | None = None) -> None:
        connection = connection or Connection()
        _, listed = read_folder(connection, address)
        files = {file.name: file for file in listed}
        names = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
        if _INDEX in files:
            names = _indexed(RangedReader(connection, files[_INDEX]), files[_INDEX].object)
        if not names:
            raise InputError("model.base_model", address, "a model folder; it has no *.safetensors weights")
        for name in names:
            if name not in files:
                raise InputError(
                    "model shard", address.child(name), "a file that is there, as the index names it"
                )

        def open_shard(name: str) -> _Shard:
            return _Shard(RangedReader(connection, files[name]), files[name].object)

        with ThreadPoolExecutor(connection.workers, "storage") as pool:
            shards = list(pool.map(open_shard, names))
        self._where = {name: shard for shard in shards for name in shard.entries}
        digest = hashlib.sha256(json.dumps([[name, files[name].identity] for name in names]).encode())
        super().__init__({n: e for shard in shards for n, e in shard.entries.items()}, digest.hexdigest())

    def _raw(self, name: str, index: int | None = None) -> torch.Tensor:
        import torch

        shard = self._where[name]
        entry = shard.entries[name]
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"tensor {name}", entry["dtype"], f"one of the types {', '.join(_DTYPES)}")
        dtype, shape = getattr(torch, _DTYPES[entry["dtype"]]), list(entry["shape"])
        begin, end = entry["data_offsets"]
        if index is not None:
            step = (end - begin) // shape.pop(0)
            begin, end = begin + index * step, begin + (index + 1) * step
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        content = shard.reader.read(shard.data + begin, end - begin)
        return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _indexed(reader: RangedReader, where: Address) -> list[str]:
    try:
        return sorted(set(json.loads(reader.read(0, reader.size))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError("model index", where, "a JSON document with a weight_map") from None
