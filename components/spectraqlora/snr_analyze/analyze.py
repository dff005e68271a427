"""The step's work: scan the original checkpoint, or the 4-bit one, a few matrices at a time."""

from __future__ import annotations

from pathlib import Path

from spectraqlora.artifacts import QuantizedModel
from spectraqlora.checkpoint import Checkpoint
from spectraqlora.models import resolve_base
from spectraqlora.progress import Progress
from spectraqlora.settings import SnrSettings
from spectraqlora.snr.scan import scan
from spectraqlora.snr.table import read_given, write_table


def analyze(settings: SnrSettings, quantized: Path, output: Path) -> None:
    """Write the SNR table of the model's linear modules to `output`, measured or given; no model is loaded."""
    manifest = QuantizedModel.read(quantized)
    if settings.table:
        write_table(read_given(Path(settings.table), manifest.modules), output)
        return
    if settings.source == "original":
        folder = resolve_base(manifest.source_path, manifest.revision)
    else:
        folder = quantized / "model"
    progress = Progress("measuring SNR", len(manifest.modules))
    table = scan(Checkpoint(folder), manifest.modules, lambda done, _, module: progress(done, module))
    write_table(table, output)
