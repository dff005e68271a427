"""The step's work: scan the original checkpoint, or the 4-bit one, a few matrices at a time."""

from __future__ import annotations

import os
from pathlib import Path

from spectraqlora.artifacts import QuantizedModel
from spectraqlora.cache import cache_folder
from spectraqlora.checkpoint import Checkpoint
from spectraqlora.models import resolve_base
from spectraqlora.progress import Progress
from spectraqlora.settings import SnrSettings
from spectraqlora.snr.finished import FinishedRows
from spectraqlora.snr.scan import scan
from spectraqlora.snr.table import read_given, write_table


def analyze(settings: SnrSettings, quantized: Path, output: Path) -> None:
    """Write the SNR table of the model's linear modules to `output`, measured or given; no model is loaded.

    Until the table is written, finished rows lie in the user's cache: an interrupted scan goes on from them.
    """
    manifest = QuantizedModel.read(quantized)
    if settings.table:
        write_table(read_given(Path(settings.table), manifest.modules), output)
        return
    if settings.source == "original":
        folder = resolve_base(manifest.source_path, manifest.revision)
    else:
        folder = quantized / "model"
    checkpoint = Checkpoint(folder)
    finished = _finished(checkpoint.digest)
    progress = Progress("measuring SNR", len(manifest.modules))
    table = scan(checkpoint, manifest.modules, lambda done, _, module: progress(done, module), finished)
    write_table(table, output)
    if finished:
        finished.remove()


def _finished(digest: str) -> FinishedRows | None:
    """Rows that an earlier scan of this checkpoint left; None where nothing can be kept."""
    folder = cache_folder() / "snr"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return FinishedRows(folder / f"{digest}.jsonl", digest) if os.access(folder, os.W_OK) else None
