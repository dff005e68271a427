"""The look at base models of many architectures, each with random weights: what is good is never refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from spectraqlora.models.inspection import inspect_folder, open_tensors
from spectraqlora.places import base_place

from tests.architectures import ARCHITECTURES, CANNOT, refusal, row, rows_in_readme, written


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_good_model_is_taken_and_each_module_knows_its_tensor(name: str, tmp_path: Path) -> None:
    folder = written(ARCHITECTURES[name], tmp_path)
    inspection = inspect_folder(folder)
    tensors = open_tensors(base_place(str(folder)))
    assert inspection.dtype == "float32"
    for info in inspection.modules:
        shape = tensors.shape(info.tensor)
        wanted = (info.out_features, info.in_features)
        assert shape == (wanted[::-1] if info.transposed else wanted), info.module
    assert row(ARCHITECTURES[name], inspection) == rows_in_readme()[name], "make docs"
    assert not any("vis" in info.module for info in inspection.modules), "the language model's alone"


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_trained_is_refused_as_the_table_says(name: str, tmp_path: Path) -> None:
    assert refusal(CANNOT[name], tmp_path) == rows_in_readme()[name], "make docs"


def test_the_table_has_a_row_for_each_architecture() -> None:
    assert list(rows_in_readme()) == [*ARCHITECTURES, *CANNOT] and len(ARCHITECTURES) > 30
