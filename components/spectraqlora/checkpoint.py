"""Model folders: refusing what cannot be used, and streaming tensors from safetensors shards."""

from __future__ import annotations

import hashlib
import json
import math
import struct
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
            "safetensors file", path, "a whole safetensors file; its header is cut short"
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


def check_model_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a model folder that cannot be loaded safely; no weights are read.

    Raises:
        InputError: no folder, config or weights; pickle-only or truncated weights; remote code needed.
    """
    field = "model.base_model"
    if not folder.is_dir():
        raise InputError(field, folder, "an existing folder")
    config = folder / "config.json"
    if not config.exists():
        raise InputError(field, folder, "a model folder; it has no config.json")
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(field, config, "valid JSON") from None
    if document.get("auto_map") and not trust_remote_code:
        raise InputError(
            field,
            folder,
            "a model without code of its own; model.trust_remote_code=true runs it, if you trust it",
        )
    shards = _shards(folder)
    if not shards:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise InputError(
                field,
                folder,
                "safetensors; it holds pickled weights only, which can run code. Convert them where you trust "
                "them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW)",
            )
        raise InputError(field, folder, "a model folder; it has no *.safetensors weights")
    for shard in shards:
        _header(shard)


_PACKED_STATE = ".quant_state.bitsandbytes__"
"""Beside a packed 4-bit tensor lies its shape and type, under the tensor's name, this and nf4 or fp4."""


class Checkpoint:
    """Tensors of a folder's safetensors shards, memory-mapped, one at a time.

    A tensor that bitsandbytes packed in 4 bits counts as the matrix that it stands for; the scales, code and
    state that transformers saves beside it are no tensors of their own. `digest` changes with the shards'
    names, sizes, times and headers; no weights are read for it.
    """

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._bytes: dict[str, int] = {}
        digest = hashlib.sha256()
        for shard in _shards(folder):
            stat = shard.stat()
            header = _header(shard)
            digest.update(json.dumps([shard.name, stat.st_size, stat.st_mtime_ns, header]).encode())
            for name, entry in header.items():
                self._where[name] = shard
                self._shapes[name] = tuple(entry["shape"])
                start, end = entry["data_offsets"]
                self._bytes[name] = end - start
        self.digest = digest.hexdigest()
        states = {name.partition(_PACKED_STATE)[0]: name for name in self._where if _PACKED_STATE in name}
        self._packed = {
            owner: [name for name in self._where if name.startswith(owner + ".")] for owner in states
        }
        for owner, parts in self._packed.items():
            state = json.loads(bytes(self._raw(states[owner]).tolist()))
            self._shapes[owner] = tuple(state["shape"])
            self._bytes[owner] = math.prod(state["shape"]) * (4 if state["dtype"] == "float32" else 2)
            for part in parts:
                del self._shapes[part]

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
        """One tensor, or one slice of its first axis, as a view of the mapped file; packed ones dequantized.

        The map, and the resident pages that it counts for, go with the last reference to the tensor.
        """
        from safetensors import safe_open

        if name in self._packed:
            return self._dequantized(name) if index is None else self._dequantized(name)[index]
        if index is None:
            return self._raw(name)
        with safe_open(self._where[name], framework="pt") as shard:
            part: torch.Tensor = shard.get_slice(name)[index]
        return part

    def _raw(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._where[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    def _dequantized(self, name: str) -> torch.Tensor:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {part: self._raw(part) for part in self._packed[name]}
        return dequantize_4bit(self._raw(name), QuantState.from_dict(parts, device=torch.device("cpu")))
