"""measure-base: the base loaded, scored and calibrated once, whatever the number of branches."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from spectraqlora.artifacts import BaseMeasurement, FourBitModel, PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_four_bit
from spectraqlora.scoring.batches import load_rows
from spectraqlora.scoring.loss import score
from spectraqlora.settings import EvaluateSettings, SelectSettings
from spectraqlora.signals.gradients import SKETCHES, read_sketches
from spectraqlora.signals.scores import calibration_sketches
from spectraqlora.steps.measure_base import measure
from spectraqlora.steps.measure_base.measure import Inputs, measure_base

from tests.measured import with_test_rows

EVALUATE = EvaluateSettings(accuracy_rows=2, max_new_tokens=4)
ENERGY = SelectSettings(calibration_batches=2)
SPECTRUM = ENERGY.model_copy(update={"signal": "spectrum"})


@pytest.mark.parametrize(
    ("methods", "select", "sketching"),
    [
        (["hybrid"], ENERGY, ["hybrid"]),
        (["qlora", "hybrid", "alors", "sgm"], ENERGY, ["hybrid", "alors", "sgm"]),
        (["qlora", "hybrid", "alors", "sgm"], SPECTRUM, ["sgm"]),
        (["qlora", "hybrid", "alors", "random"], SPECTRUM, []),
        (["qlora"], ENERGY, []),
    ],
)
def test_the_base_is_loaded_scored_and_calibrated_once_for_all_branches(
    methods: Sequence[str], select: SelectSettings, sketching: list[str], quantized: Path, prepared: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    loads: list[Path] = []
    monkeypatch.setattr(measure, "load_four_bit", lambda path: loads.append(path) or load_four_bit(path))
    result = measure_base(Inputs(quantized, prepared), methods, select, EVALUATE, 1, tmp_path)
    said = capfd.readouterr().out
    assert loads == [quantized]
    assert len(re.findall("^scoring the base model", said, re.M)) == 1
    calibrations = re.findall("^measuring the base model's gradients, once for (.*)$", said, re.M)
    assert calibrations == ([", ".join(sketching)] if sketching else [])
    assert result.sketched == (tmp_path / SKETCHES).exists() == bool(sketching)


def test_it_holds_the_bases_own_numbers(quantized: Path, prepared: Path, tmp_path: Path) -> None:
    result = measure_base(Inputs(quantized, prepared), ["qlora"], ENERGY, EVALUATE, 1, tmp_path)
    assert BaseMeasurement.read(tmp_path) == result
    model, manifest = load_four_bit(quantized)
    expected = score(model, load_rows(prepared, "held_out"), EVALUATE.batch_size)
    assert (result.loss, result.row_losses, result.row_tokens) == (
        expected.loss, expected.losses, expected.tokens
    )  # fmt: skip
    assert result.base_digest == manifest.base_digest
    assert result.rows_digest == PreparedRows.read(prepared).digest
    assert result.accuracy == 0.0
    assert set(result.headline()) == {"loss", "perplexity", "accuracy", "test_loss"}


def test_test_rows_are_scored_where_there_are_some(quantized: Path, prepared: Path, tmp_path: Path) -> None:
    rows = with_test_rows(prepared, tmp_path / "rows")
    result = measure_base(Inputs(quantized, rows), ["qlora"], ENERGY, EVALUATE, 1, tmp_path / "measurement")
    model, _ = load_four_bit(quantized)
    assert result.test_loss == score(model, load_rows(rows, "test"), EVALUATE.batch_size).loss != result.loss
    assert result.headline()["test_loss"] == result.test_loss
    held_out = score(model, load_rows(prepared, "held_out"), EVALUATE.batch_size)
    assert result.row_losses == held_out.losses, "they are among no other rows"


def test_its_sketches_are_those_of_a_base_that_was_only_calibrated(
    quantized: Path, prepared: Path, tmp_path: Path
) -> None:
    measure_base(Inputs(quantized, prepared), ["sgm"], SPECTRUM, EVALUATE, 3, tmp_path)
    model, manifest = load_four_bit(quantized)
    expected = calibration_sketches(model, manifest.modules, prepared, SPECTRUM, 3)
    found = read_sketches(tmp_path)
    assert found.keys() == expected.keys() == {m.module for m in FourBitModel.read(quantized).modules}
    for name, sketch in expected.items():
        assert found[name].gradient_snr == sketch.gradient_snr
        assert (found[name].range_sketch == sketch.range_sketch).all()
        assert (found[name].sketch == sketch.sketch).all()


def test_an_unknown_method_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    nowhere = Inputs(tmp_path / "none", tmp_path / "none")
    with pytest.raises(InputError, match="method: 'magic'"):
        measure_base(nowhere, ["qlora", "magic"], ENERGY, EVALUATE, 1, tmp_path)
