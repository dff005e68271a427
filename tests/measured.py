"""What measure-base leaves for the steps after it, for tests that begin there."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from datasets import load_from_disk
from spectraqlora.artifacts import PreparedRows
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


def with_test_rows(prepared: Path, folder: Path) -> Path:
    """A copy of prepared rows in which five of the rows to train on are test rows instead; returns it."""
    rows = load_from_disk(str(prepared / "train"))
    shutil.copytree(prepared, folder, ignore=lambda _, names: {"train", "test"} & set(names))
    rows.select(range(5, len(rows))).save_to_disk(str(folder / "train"))
    rows.select(range(5)).save_to_disk(str(folder / "test"))
    PreparedRows.read(prepared).model_copy(update={"test_rows": 5}).write(folder)
    return folder
