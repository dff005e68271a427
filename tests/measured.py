"""What measure-base leaves for the steps after it, for tests that begin there."""

from collections.abc import Sequence
from pathlib import Path

from spectraqlora.settings import EvaluateSettings, SelectSettings


def write_measurement(
    four_bit: Path,
    rows: Path,
    select: SelectSettings,
    seed: int,
    folder: Path,
    methods: Sequence[str] = ("sgm",),
    evaluate: EvaluateSettings = EvaluateSettings(accuracy_rows=0),
) -> Path:
    """Measure the base for `methods` into `folder`; returns it. For sgm all modules' gradients are sketched."""
    from spectraqlora.steps.measure_base.measure import Inputs, measure_base

    measure_base(Inputs(four_bit, rows), methods, select, evaluate, seed, folder)
    return folder
