"""Packed checkpoints as plain ones: every matrix unpacked, one at a time, into safetensors shards."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spectraqlora.models.headers import TYPES
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.places import INDEX
from spectraqlora.runtime.disk import ask

_SHARD_BYTES = 2 << 30


@contextlib.contextmanager
def plain_folder(folder: Path) -> Iterator[Path]:
    """A model folder whose weights are not packed: the folder itself, or a copy that is gone afterwards.

    The copy holds 2 bytes a number (4 where the checkpoint says float32), in the scratch folder (`TMPDIR`);
    memory is that of a shard of 2 GiB, or of the largest matrix.

    Raises:
        InputError: no room for the copy, or what `LocalTensors` refuses.
    """
    tensors = LocalTensors(folder)
    if not tensors.packed:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="spectraqlora-plain-") as scratch:
        copy = Path(scratch) / "model"
        _write_plain(folder, tensors, copy)
        yield copy


def _write_plain(folder: Path, tensors: LocalTensors, copy: Path) -> None:
    import torch
    from safetensors.torch import save_file

    copy.mkdir()
    ask(copy, sum(map(_bytes(tensors), tensors.names())), "the unpacked weights (TMPDIR says where)")
    for path in folder.iterdir():
        if (
            path.is_file()
            and path.suffix in (".json", ".jinja", ".py", ".txt", ".model")
            and path.name != INDEX
        ):
            shutil.copyfile(path, copy / path.name)
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (document, document.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
            part.pop("compression_config", None)
    (copy / "config.json").write_text(json.dumps(document))
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    filled = 0

    def flush() -> None:
        nonlocal filled
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, copy / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        filled = 0

    for name in tensors.names():
        weight = tensors.load(name)
        if name in tensors.packings:
            weight = weight.to(torch.bfloat16) if weight.dtype == torch.float32 else weight
        shard[name] = weight.contiguous()
        filled += weight.numel() * weight.element_size()
        if filled >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _bytes(tensors: LocalTensors):  # type: ignore[no-untyped-def]
    def size(name: str) -> int:
        numbers = 1
        for side in tensors.shape(name):
            numbers *= side
        return numbers * (2 if name in tensors.packings else TYPES[tensors.dtype(name)].bits // 8)

    return size
