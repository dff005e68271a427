"""Model folders to damage: copies, their configs and their weights, changed by hand."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON document in place; what `change` returns takes its place, unless it is None."""
    document = json.loads(path.read_text())
    changed = change(document)
    path.write_text(json.dumps(document if changed is None else changed))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of `model.safetensors` in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header as it is, and the bytes behind it."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a safetensors file says of its bytes, and not the bytes."""
    header, data = header_of(path)
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
