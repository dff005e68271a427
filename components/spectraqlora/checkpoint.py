"""Model folders: refusing what cannot be used, and streaming tensors from safetensors shards."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from spectraqlora.errors import InputError

if TYPE_CHECKING:
    import torch


def _header(path: Path) -> dict[str, dict[str, object]]:
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


class Checkpoint:
    """Tensors of a folder's safetensors shards, memory-mapped, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for shard in _shards(folder):
            for name, entry in _header(shard).items():
                self._where[name] = shard
                self._shapes[name] = tuple(entry["shape"])  # type: ignore[arg-type]

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return self._shapes[name]

    def load(self, name: str) -> torch.Tensor:
        """One tensor, copied out of the mapped file."""
        from safetensors import safe_open

        with safe_open(self._where[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor
