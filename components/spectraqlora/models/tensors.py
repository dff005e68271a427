"""Model folders: refusing what cannot be used, and streaming tensors from safetensors shards."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.errors import InputError

if TYPE_CHECKING:
    import torch


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's header, after its promise of bytes was held against the file's size."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            "safetensors file", path, "a complete safetensors file; its header is cut short"
        ) from None
    if size != 8 + length + end:
        raise InputError("safetensors file", path, f"{8 + length + end} bytes; it is truncated at {size}")
    return header


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise InputError("model index", index, "a JSON document with a weight_map") from None
        shards = [folder / name for name in names]
        for shard in shards:
            if not shard.exists():
                raise InputError("model shard", shard, "a file that is there, as the index names it")
        return shards
    return sorted(folder.glob("*.safetensors"))


def check_model_files(
    place: object, names: Collection[str], config: str | None, trust_remote_code: bool = False
) -> None:
    """Refuse a model folder by the names of its files and the text of its `config.json`.

    Raises:
        InputError: no config or weights, pickles only, or remote code needed.
    """
    field = "model.base_model"
    if config is None:
        raise InputError(field, place, "a model folder; it has no config.json")
    try:
        document = json.loads(config)
        own_code = document.get("auto_map")
    except (ValueError, AttributeError):
        raise InputError(field, f"{place}/config.json", "valid JSON") from None
    if own_code and not trust_remote_code:
        raise InputError(
            field,
            place,
            "a model without code of its own; model.trust_remote_code=true runs it, if you trust it",
        )
    suffixes = {Path(name).suffix for name in names}
    if ".safetensors" in suffixes:
        return
    if suffixes & {".bin", ".pt", ".pth"}:
        raise InputError(
            field,
            place,
            "safetensors; it holds pickled weights only, which can run code. Convert them where you trust "
            "them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW)",
        )
    raise InputError(field, place, "a model folder; it has no *.safetensors weights")


def check_model_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a model folder that cannot be loaded safely; no weights are read.

    Raises:
        InputError: no folder, config or weights; pickle-only or truncated weights; remote code needed.
    """
    if not folder.is_dir():
        raise InputError("model.base_model", folder, "an existing folder")
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    check_model_files(folder, [path.name for path in folder.iterdir()], text, trust_remote_code)
    for shard in _shards(folder):
        _header(shard)


_PACKED_STATE = ".quant_state.bitsandbytes__"
"""Shape and type of a packed 4-bit tensor are next to it, under the tensor's name, this and nf4 or fp4."""


class Tensors(ABC):
    """Tensors of a model's safetensors shards, one at a time, wherever the shards are.

    A tensor that bitsandbytes packed in 4 bits counts as the matrix that it stands for; the scales, code and
    state that transformers saves beside it are no tensors of their own.

    Args:
        entries: the shards' headers together: `shape`, `dtype` and `data_offsets` by tensor.
        digest: changes with the shards' names, content and headers.
    """

    def __init__(self, entries: dict[str, dict[str, Any]], digest: str) -> None:
        self.digest = digest
        self._shapes: dict[str, tuple[int, ...]] = {name: tuple(e["shape"]) for name, e in entries.items()}
        self._bytes = {name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in entries.items()}
        states = {name.partition(_PACKED_STATE)[0]: name for name in entries if _PACKED_STATE in name}
        self._packed = {owner: [name for name in entries if name.startswith(owner + ".")] for owner in states}
        for owner, parts in self._packed.items():
            state = json.loads(bytes(self._raw(states[owner]).tolist()))
            self._shapes[owner] = tuple(state["shape"])
            self._bytes[owner] = math.prod(state["shape"]) * (4 if state["dtype"] == "float32" else 2)
            for part in parts:
                del self._shapes[part]

    @abstractmethod
    def _raw(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor as it is stored, or one slice of its first axis."""

    @property
    def packed(self) -> bool:
        """Whether any tensor is packed in 4 bits."""
        return bool(self._packed)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, unpacked, from the header."""
        return self._shapes[name]

    def matrix_bytes(self, name: str) -> int:
        """Bytes of a tensor, unpacked, or of one slice of its first axis where it has three."""
        return self._bytes[name] // (self.shape(name)[0] if len(self.shape(name)) == 3 else 1)

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or one slice of its first axis; packed ones dequantized."""
        if name in self._packed:
            return self._dequantized(name) if index is None else self._dequantized(name)[index]
        return self._raw(name, index)

    def _dequantized(self, name: str) -> torch.Tensor:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {part: self._raw(part) for part in self._packed[name]}
        return dequantize_4bit(self._raw(name), QuantState.from_dict(parts, device=torch.device("cpu")))


class LocalTensors(Tensors):
    """Tensors of a local folder's shards, memory-mapped.

    The map, and the resident pages that it counts for, go with the last reference to a loaded tensor.
    `digest` takes the shards' sizes and times for their content; no weights are read for it.
    """

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        entries: dict[str, dict[str, Any]] = {}
        digest = hashlib.sha256()
        for shard in _shards(folder):
            stat = shard.stat()
            header = _header(shard)
            digest.update(json.dumps([shard.name, stat.st_size, stat.st_mtime_ns, header]).encode())
            entries |= header
            self._where |= dict.fromkeys(header, shard)
        super().__init__(entries, digest.hexdigest())

    def _raw(self, name: str, index: int | None = None) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._where[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name) if index is None else shard.get_slice(name)[index]
        return tensor
