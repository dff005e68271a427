"""What the steps of a run write, against what they wrote."""

from pathlib import Path

import pytest
from spectraqlora.planning.disk import TEXTS_BYTES, StepDisk, base_bytes, disk, most
from spectraqlora.planning.shape import ModelShape, config_of
from spectraqlora.settings import parse
from transformers import AutoConfig

from tests.small import small


def written(folder: Path, suffix: str = ".safetensors") -> int:
    return sum(path.stat().st_size for path in folder.rglob(f"*{suffix}"))


def by_step(shape: ModelShape, settings: object) -> dict[str, StepDisk]:
    return {step.step: step for step in disk(shape, settings)}  # type: ignore[arg-type]


def test_the_4_bit_model_and_the_base_take_what_is_planned(tiny_model: Path, quantized: Path) -> None:
    shape = ModelShape(config_of(str(tiny_model)), "float32")
    planned = by_step(shape, small())["quantize-load"].kept - TEXTS_BYTES
    header = 64 * 1024
    assert 0 <= written(quantized) - planned < header
    assert 0 <= written(tiny_model) - base_bytes(shape) < header


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_the_export_is_planned_in_the_bases_type_whatever_it_is_computed_in(
    dtype: str, size: int, tiny_model: Path, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    config.dtype = dtype
    config.save_pretrained(tmp_path)
    shape = ModelShape(config_of(str(tmp_path)), "float32")
    assert base_bytes(shape) == size * shape.parameters
    assert by_step(shape, small())["merge-export"].kept > size * shape.parameters


def test_what_is_registered_elsewhere_takes_scratch_and_no_room_in_the_workdir() -> None:
    shape = ModelShape(config_of("7B"), "bfloat16")
    here, there, adapter = (
        by_step(shape, parse({"tracking": tracking}))["register"]
        for tracking in ({}, {"uri": "http://mlflow:5000"}, {"registered_form": "adapter"})
    )
    assert here.kept > here.passing > base_bytes(shape) > adapter.kept > there.kept == adapter.passing == 0
    assert there.passing == here.passing


def test_the_most_at_once_is_what_is_kept_and_the_largest_that_passes_on_top_of_it() -> None:
    steps = (StepDisk("a", 5, 4, ""), StepDisk("b", 1, 20, ""), StepDisk("c", 3, 0, ""))
    assert most(steps) == 26
    assert most(()) == 0
