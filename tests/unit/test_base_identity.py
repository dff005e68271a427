"""What a training is of: two bases of one architecture are two trainings, wherever they are kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from spectraqlora.artifacts import FourBitModel
from spectraqlora.files import folder_digest
from spectraqlora.models import adapters
from spectraqlora.settings import CheckpointSettings, ModelSettings
from spectraqlora.steps.quantize_load.quantize import quantize

from tests.unit.models.test_adapters import DOWN, Q0, rank_map
from tests.unit.steps.train.test_checkpoints import trained


def as_snapshot(model: Path, cache: Path, scale: float) -> Path:
    """The model with scaled weights in a hub cache: names in a snapshot that are links to blobs."""
    blobs = cache / "blobs"
    shutil.copytree(model, blobs)
    weights = load_file(blobs / "model.safetensors")
    save_file(
        {name: scale * tensor for name, tensor in weights.items()},
        blobs / "model.safetensors",
        {"format": "pt"},
    )
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_bases_below_a_cache_share_a_checkpoint_folder_and_never_a_checkpoint(
    tiny_model: Path, prepared: Path, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    outputs = []
    for name, scale in (("one", 1.0), ("two", 1.05)):
        base = as_snapshot(
            tiny_model, tmp_path / ".cache" / "huggingface" / "hub" / f"models--owner--{name}", scale
        )
        quantized, ranks, output = (tmp_path / f"{part}-{name}" for part in ("quantized", "ranks", "adapter"))
        quantize(ModelSettings(base_model=str(base)), quantized, tmp_path / f"outline-{name}")
        assert FourBitModel.read(quantized).base_digest == folder_digest(base)
        rank_map(quantized, {Q0: 4, DOWN: 4}).write(ranks)
        trained(
            quantized, prepared, ranks, output, CheckpointSettings(folder=str(checkpoints), every_steps=4)
        )
        outputs.append(adapters.read_adapter_weights(output))
    assert len(list(checkpoints.iterdir())) == 2, "two trainings, each with its own identity"
    assert not all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
