"""What measure-base leaves for select-layers, for tests that begin there."""

from pathlib import Path

from spectraqlora.settings import SelectSettings


def write_measurement(four_bit: Path, rows: Path, select: SelectSettings, seed: int, folder: Path) -> Path:
    """Sketch the gradients of all modules of the 4-bit base, in one pass, into `folder`; returns it."""
    from spectraqlora.models.loading import load_four_bit
    from spectraqlora.signals.gradients import write_sketches
    from spectraqlora.signals.scores import calibration_sketches

    model, manifest = load_four_bit(four_bit)
    write_sketches(calibration_sketches(model, manifest.modules, rows, select, seed), folder)
    return folder
