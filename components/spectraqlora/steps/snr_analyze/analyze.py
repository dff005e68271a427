"""The step's work: scan the original checkpoint, or the 4-bit one, a few matrices at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from spectraqlora.artifacts import FourBitModel, ModelOutline
from spectraqlora.errors import InputError
from spectraqlora.models.loading import original_tensors
from spectraqlora.models.tensors import LocalTensors, Tensors
from spectraqlora.places import file_place
from spectraqlora.runtime.cache import cache_folder
from spectraqlora.runtime.console import Progress
from spectraqlora.settings import SnrSettings
from spectraqlora.snr.journal import ScanJournal
from spectraqlora.snr.scan import scan
from spectraqlora.snr.table import read_given, write_table


@dataclass(frozen=True)
class Inputs:
    """The folders that the step reads; the 4-bit model only where its weights are measured."""

    outline: Path
    four_bit: Path | None = None


def analyze(inputs: Inputs, settings: SnrSettings, output: Path) -> None:
    """Write the SNR table of the model's linear modules to `output`, measured or given; no model is loaded.

    Until the table is written, finished rows are in the user's cache: an interrupted scan resumes from them.

    Raises:
        InputError: the 4-bit weights are to be measured, but are not among the inputs or another model's; or the
            original, or the given table, is not there or is another one.
    """
    manifest = ModelOutline.read(inputs.outline)
    if settings.table:
        write_table(read_given(given_table(settings.table), manifest.modules, settings.ties), output)
        return
    checkpoint = _checkpoint(inputs, manifest, settings)
    journal = _journal(checkpoint.digest)
    progress = Progress("measuring SNR", len(manifest.modules))
    table = scan(
        checkpoint, manifest.modules, lambda done, _, module: progress(done, module), journal, settings.ties
    )
    write_table(table, output)
    if journal:
        journal.remove()


def _checkpoint(inputs: Inputs, manifest: ModelOutline, settings: SnrSettings) -> Tensors:
    if settings.source == "original":
        return original_tensors(manifest)
    if inputs.four_bit is None:
        raise InputError(
            "snr.source",
            "quantized",
            "original, or a pipeline compiled with snr.source=quantized; this one hands snr-analyze no 4-bit weights",
        )
    packed = FourBitModel.read(inputs.four_bit)
    if packed.base_digest != manifest.base_digest:
        raise InputError(
            "four_bit base_digest",
            packed.base_digest[:12],
            f"{manifest.base_digest[:12]}, the base model of the outline",
        )
    return LocalTensors(inputs.four_bit / "model")


def given_table(name: str) -> Path:
    """The file of a table measured elsewhere, fetched where it is at an s3:// address."""
    return file_place(name, "snr.table").local_copy()


def _journal(digest: str) -> ScanJournal | None:
    """Rows that an earlier scan of this checkpoint left; None where nothing can be kept."""
    folder = cache_folder() / "snr"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return ScanJournal(folder / f"{digest}.jsonl", digest) if os.access(folder, os.W_OK) else None
