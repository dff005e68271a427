"""The step's work: scan the original checkpoint, or the 4-bit weights one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spectraqlora.artifacts import QuantizedModel
from spectraqlora.models import dequantized_weight, load_quantized, resolve_base
from spectraqlora.progress import Progress
from spectraqlora.settings import SnrSettings
from spectraqlora.snr.scan import scan_tensors, tensors_of
from spectraqlora.snr.table import write_table

if TYPE_CHECKING:
    import torch


def analyze(settings: SnrSettings, quantized: Path, output: Path) -> None:
    """Write the SNR table of the model's linear modules to `output`."""
    manifest = QuantizedModel.read(quantized)
    progress = Progress("measuring SNR", len(manifest.modules))

    def counted(stream: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for index, pair in enumerate(stream, 1):
            yield pair
            progress(index, pair[0])

    if settings.source == "original":
        stream = tensors_of(resolve_base(manifest.source_path, manifest.revision), manifest.modules)
    else:
        model, _ = load_quantized(quantized)
        named = dict(model.named_modules())
        stream = ((m.module, dequantized_weight(named[m.module]).cpu()) for m in manifest.modules)
    write_table(scan_tensors(counted(stream), settings.source), output)
