"""Tensors of a model folder in object storage, read where they are."""

from __future__ import annotations

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from spectraqlora.errors import InputError
from spectraqlora.models.tensors import Tensors
from spectraqlora.storage import Address, Connection, RangedReader, read_folder

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
                "safetensors object", where, "a complete safetensors file; its header is cut short"
            ) from None
        self.data = 8 + length
        if reader.size != self.data + end:
            raise InputError(
                "safetensors object", where, f"{self.data + end} bytes; it is truncated at {reader.size}"
            )
        self.entries = entries


class S3Tensors(Tensors):
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
