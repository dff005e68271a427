"""Tensors of model folders: streamed one at a time from safetensors shards, packed ones as the matrices they stand for."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.errors import InputError
from spectraqlora.models.headers import Entry, Header, read_local_header
from spectraqlora.models.packings import Packing, packings
from spectraqlora.places import INDEX, read_document, weight_files

if TYPE_CHECKING:
    import torch


class Tensors(ABC):
    """Tensors of a model's safetensors shards, one at a time, wherever the shards are.

    A packed tensor counts as the matrix that it stands for; the scales, codes and states that are stored beside
    it are no tensors of their own.

    Args:
        headers: of the shards, by name.
        weight_map: the index's file by tensor; empty where there is no index.
        quantization: `quantization_config` of the config; empty where it has none.
        digest: changes with the shards' names, content and headers.
        where: the folder, as messages name it.

    Raises:
        InputError: a tensor in two shards, an index that names what is not there, parts of a packed tensor that
            are missing or do not fit.
    """

    def __init__(
        self,
        headers: Mapping[str, Header],
        weight_map: Mapping[str, str],
        quantization: Mapping[str, Any],
        digest: str,
        where: object,
    ) -> None:
        self.digest, self.where = digest, where
        self.stored: dict[str, Entry] = {}
        """The tensors as they are in the files."""
        self.files: dict[str, str] = {}
        """The file of each stored tensor."""
        for file, header in headers.items():
            for name, entry in header.entries.items():
                if name in self.files:
                    raise InputError(
                        "safetensors file", f"{where}/{file}", f"no {name!r}; {self.files[name]} has it too"
                    )
                self.stored[name], self.files[name] = entry, file
        for name, file in weight_map.items():
            if self.files.get(name) != file:
                raise InputError(
                    "model index",
                    f"{where}/{INDEX}",
                    f"tensor {name!r} in {file}, as it says; it is not there",
                )
        self.packings: dict[str, Packing] = packings(self.stored, quantization, self._raw, where)
        parts = {part for packing in self.packings.values() for part in packing.parts}
        self._plain = {name: entry for name, entry in self.stored.items() if name not in parts}

    @abstractmethod
    def _raw(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor as it is stored, or one slice of its first axis."""

    @property
    def packed(self) -> bool:
        """Whether any tensor is packed."""
        return bool(self.packings)

    def names(self) -> list[str]:
        """All tensor names."""
        return [*self._plain, *self.packings]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, unpacked, from the header."""
        return self.packings[name].shape if name in self.packings else self._plain[name].shape

    def file(self, name: str) -> str:
        """The file that holds a tensor, or the codes of a packed one."""
        return self.files[self.packings[name].parts[0] if name in self.packings else name]

    def dtype(self, name: str) -> str:
        """The type of a tensor's numbers, as headers call it; of a packed one F32, which it is unpacked to at most."""
        return "F32" if name in self.packings else self._plain[name].dtype

    def matrix_bytes(self, name: str) -> int:
        """Bytes of a tensor, unpacked, or of one slice of its first axis where it has three."""
        shape = self.shape(name)
        entry = self._plain.get(name)
        size = self.packings[name].bytes if entry is None else entry.end - entry.begin
        return size // (max(1, shape[0]) if len(shape) == 3 else 1)

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or one slice of its first axis; packed ones unpacked."""
        if name in self.packings:
            packing = self.packings[name]
            return packing.unpack(self._raw) if index is None else packing.unpack_slice(self._raw, index)
        return self._raw(name, index)


class LocalTensors(Tensors):
    """Tensors of a local folder's shards, memory-mapped.

    The map, and the resident pages that it counts for, go with the last reference to a loaded tensor.
    `digest` takes the shards' sizes and times for their content; no weights are read for it.

    Raises:
        InputError: no safetensors in the folder, a shard that the index names and that is missing, a malformed or
            truncated shard, or what `Tensors` refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        index = _text(folder / INDEX)
        files, weight_map = weight_files(names, index, folder)
        headers: dict[str, Header] = {}
        digest = hashlib.sha256()
        for file in files:
            headers[file] = read_local_header(folder / file)
            stat = (folder / file).stat()
            digest.update(json.dumps([file, stat.st_size, stat.st_mtime_ns, headers[file].entries]).encode())
        super().__init__(
            headers,
            weight_map,
            quantization(_text(folder / "config.json"), folder),
            digest.hexdigest(),
            folder,
        )

    def _raw(self, name: str, index: int | None = None) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._folder / self.files[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name) if index is None else shard.get_slice(name)[index]
        return tensor


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def quantization(config: str | None, where: object) -> Mapping[str, Any]:
    """The `quantization_config` of a `config.json`, or of its text model; empty where there is none.

    Raises:
        InputError: it is no JSON object.
    """
    if config is None:
        return {}
    document = read_document(config, f"{where}/config.json")
    for part in (document, document.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config") is not None:
            if not isinstance(part["quantization_config"], dict):
                raise InputError(
                    "model.base_model", f"{where}/config.json", "a quantization_config that is an object"
                )
            return part["quantization_config"]
    compression = document.get("compression_config")
    return {**compression, "quant_method": "compressed-tensors"} if isinstance(compression, dict) else {}
