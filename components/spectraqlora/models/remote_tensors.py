"""Tensors of a model folder in object storage, read where they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from spectraqlora.errors import InputError
from spectraqlora.models.headers import TYPES, Header, read_header
from spectraqlora.models.tensors import Tensors, quantization
from spectraqlora.places import INDEX, weight_files
from spectraqlora.storage import Address, Connection, RangedReader, read_folder

if TYPE_CHECKING:
    import torch

_WORKERS = 8


class _Reader(Protocol):
    """Random access to one file."""

    size: int

    def read(self, offset: int, length: int) -> bytearray: ...


class _RemoteTensors(Tensors):
    """Tensors of a model folder that is read in ranges.

    Opening reads the shards' headers only; loading one reads its own bytes.
    """

    def __init__(
        self,
        readers: Mapping[str, _Reader],
        identities: Mapping[str, str],
        where: object,
        shown: Mapping[str, object],
    ) -> None:
        def text(name: str) -> str | None:
            return (
                readers[name].read(0, readers[name].size).decode("utf-8", "replace")
                if name in readers
                else None
            )

        names, weight_map = weight_files(readers.keys(), text(INDEX), where)
        self._readers = {name: readers[name] for name in names}

        def header(name: str) -> Header:
            return read_header(readers[name].read, readers[name].size, shown[name])

        with ThreadPoolExecutor(_WORKERS, "headers") as pool:
            self._headers = dict(zip(names, pool.map(header, names), strict=True))
        digest = hashlib.sha256(json.dumps([[name, identities[name]] for name in names]).encode())
        super().__init__(
            self._headers, weight_map, quantization(text("config.json"), where), digest.hexdigest(), where
        )

    def _raw(self, name: str, index: int | None = None) -> torch.Tensor:
        import torch

        file, entry = self.files[name], self.stored[name]
        if not (stored := TYPES[entry.dtype].torch):
            raise InputError(f"tensor {name}", entry.dtype, "a type that torch has")
        dtype, shape = getattr(torch, stored), list(entry.shape)
        begin, end = entry.begin, entry.end
        if index is not None:
            step = (end - begin) // shape.pop(0)
            begin, end = begin + index * step, begin + (index + 1) * step
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        content = self._readers[file].read(self._headers[file].data + begin, end - begin)
        return torch.frombuffer(content, dtype=dtype).reshape(shape)


class S3Tensors(_RemoteTensors):
    """Tensors of a model folder in object storage, one at a time, without a copy on disk.

    Raises:
        InputError: no safetensors there, a shard that the index names and that is missing, a malformed or
            truncated shard, what `Tensors` refuses, or a store that refuses.
    """

    def __init__(self, address: Address, connection: Connection | None = None) -> None:
        connection = connection or Connection()
        _, listed = read_folder(connection, address)
        super().__init__(
            {file.name: RangedReader(connection, file) for file in listed},
            {file.name: file.identity for file in listed},
            address,
            {file.name: file.object for file in listed},
        )


class HubTensors(_RemoteTensors):
    """Tensors of a model on the hub, read in ranges of its files.

    Args:
        name: hub id.
        commit: commit, branch or tag.
        where: the model, as messages name it.

    Raises:
        InputError: as `S3Tensors`.
    """

    def __init__(self, name: str, commit: str, where: object) -> None:
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.hf_api import RepoFile

        from spectraqlora.hub import HubFile, limit_requests, refusal

        def fault(error: Exception) -> InputError:
            return refusal("model.base_model", where, "a hub model whose files can be read", error)

        limit_requests()
        # Not HfFileSystem: it refuses names of one part, such as gpt2.
        listed = HfApi().list_repo_tree(name, revision=commit)
        sizes = {entry.path: entry.size for entry in listed if isinstance(entry, RepoFile)}
        readers = {
            file: HubFile(hf_hub_url(name, file, revision=commit), int(size), fault)
            for file, size in sizes.items()
        }
        super().__init__(
            readers, dict.fromkeys(readers, commit), where, {file: f"{where}/{file}" for file in readers}
        )
