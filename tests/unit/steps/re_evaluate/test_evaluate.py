"""Re-evaluation: the adapter's loss, the SNR of the weights it updated, and the round that follows, if one does."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from spectraqlora.artifacts import (
    BaseMeasurement,
    Evaluation,
    FourBitModel,
    RankMap,
    TrainingLog,
)
from spectraqlora.errors import InputError
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.scoring import loss
from spectraqlora.settings import EvaluateSettings, SelectSettings, SnrSettings
from spectraqlora.signals import gradients
from spectraqlora.signals.scores import calibration_sketches
from spectraqlora.snr import workers
from spectraqlora.snr.marchenko_pastur import statistics
from spectraqlora.snr.scan import tensors_of
from spectraqlora.snr.table import read_table
from spectraqlora.steps.re_evaluate import evaluate
from spectraqlora.steps.re_evaluate.evaluate import Inputs, Outputs, Sections, re_evaluate
from spectraqlora.steps.snr_analyze.analyze import Inputs as SnrInputs
from spectraqlora.steps.snr_analyze.analyze import analyze

from tests.measured import with_test_rows, write_measurement
from tests.unit.models.test_adapters import DOWN, Q0, randomize, rank_map

EVALUATE = EvaluateSettings(accuracy_rows=2, max_new_tokens=4, update_energy=1.0)
SELECT = SelectSettings(signal="spectrum", rank=4, rank_high=4, rank_low=2, calibration_batches=2)
SECTIONS = Sections(EVALUATE, SELECT, SnrSettings())
LOG = TrainingLog(
    method="alors", round=1, settings={"max_steps": 2}, trainable_parameters=1, train_seconds=1.0, train_tokens=1,
    train_tokens_per_second=1.0, peak_memory_bytes=1, best_eval_loss=1.0, loss_curve=[], eval_curve=[],
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(
    quantized: Path, outline: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """SNR table and measurement of the base."""
    folder = tmp_path_factory.mktemp("measured")
    analyze(SnrInputs(outline), SnrSettings(), folder / "table")
    write_measurement(quantized, prepared, SELECT, 1, folder / "measurement", ("qlora",), EVALUATE)
    return folder


Make = Callable[..., tuple[Inputs, Outputs]]


@pytest.fixture
def trained(quantized: Path, prepared: Path, measured: Path, tmp_path: Path) -> Make:
    """Makes what training with two adapters, one of them in round `round`, leaves for a method."""

    def make(method: str = "alors", round: int = 1) -> tuple[Inputs, Outputs]:
        ranks = rank_map(quantized, {Q0: 4, DOWN: 4}).model_copy(update={"method": method, "round": round})
        wrapped = adapters.attach(load_four_bit(quantized)[0], ranks)
        randomize(wrapped)
        ranks.write(tmp_path / "rank_map")
        adapters.save(wrapped, tmp_path / "adapter", "base")
        LOG.write(tmp_path / "adapter")
        inputs = Inputs(
            quantized, prepared, tmp_path / "rank_map", tmp_path / "adapter", measured / "table",
            measured / "measurement",
        )  # fmt: skip
        return inputs, Outputs(*(tmp_path / name for name in ("evaluation", "next_rank_map", "next_adapter")))

    return make


def test_the_snr_after_training_is_that_of_the_updated_weights(trained: Make, quantized: Path) -> None:
    inputs, outputs = trained()
    result = re_evaluate(inputs, outputs, SECTIONS, 1, 1, 1)
    manifest = FourBitModel.read(quantized)
    weights = dict(tensors_of(LocalTensors(Path(manifest.source_path)), manifest.modules))
    updates = adapters.read_adapter_weights(inputs.adapter)
    for name, weight in weights.items():
        update = torch.zeros_like(weight)
        if name in (Q0, DOWN):
            update = 2.0 * updates[f"{name}.lora_B"] @ updates[f"{name}.lora_A"]
            spectrum = result.rounds[0].update_spectrum[name]
            packed = result.rounds[0].update_spectrum[name]["relative_norm"]
            assert packed == pytest.approx(float(update.norm() / weight.norm()), rel=0.02)
            assert spectrum["energy_rank"] == 4
            assert statistics(weight + update).snr != pytest.approx(statistics(weight).snr, rel=1e-2)
        assert result.snr_after[name] == pytest.approx(statistics(weight + update).snr, rel=1e-4)


@pytest.mark.parametrize("source", ["original", "quantized"])
def test_only_matrices_with_an_adapter_are_measured_and_the_others_keep_their_rows(
    source: str, trained: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs = trained()
    scanned: list[torch.Tensor] = []
    monkeypatch.setattr(workers, "statistics", lambda weight: scanned.append(weight) or statistics(weight))
    re_evaluate(inputs, outputs, replace(SECTIONS, snr=SnrSettings(source=source)), 1, 1, 1)
    assert len(scanned) == 2
    before, after = read_table(inputs.table), read_table(outputs.evaluation)
    adapted = before["module"].isin([Q0, DOWN])
    # Percentiles are places among all matrices of a type, and move with those that were updated.
    columns = [column for column in before.columns if column != "percentile"]
    pd.testing.assert_frame_equal(before[~adapted][columns], after[~adapted][columns])
    assert (before[adapted]["snr"] != after[adapted]["snr"]).all()
    assert set(after[adapted]["source"]) == {source}
    for _, group in after.groupby("type"):
        assert sorted(group["percentile"]) == [25.0, 50.0, 75.0, 100.0]


def test_the_base_is_taken_from_its_measurement_and_not_scored_again(
    trained: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs, outputs = trained()
    calls: list[object] = []
    monkeypatch.setattr(
        evaluate, "score", lambda *given, **named: calls.append(given) or loss.score(*given, **named)
    )
    result = re_evaluate(inputs, outputs, SECTIONS, 1, 1, 1)
    assert len(calls) == 1
    assert "scoring the base" not in capfd.readouterr().out
    base = BaseMeasurement.read(inputs.measurement)
    assert (result.base_eval_loss, result.base_perplexity) == (base.loss, base.perplexity)
    assert result.base_accuracy == base.accuracy == 0.0
    assert (
        result.settings["evaluate"]["update_energy"] == 1.0 and result.settings["snr"]["source"] == "original"
    )


@pytest.mark.parametrize(("method", "rounds"), [("alors", 1), ("qlora", 1), ("qlora", 3), ("sgm", 2)])
def test_where_no_round_follows_nothing_is_measured_or_made_for_it(
    method: str, rounds: int, trained: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured_anyway(*_: object, **__: object) -> None:
        raise AssertionError("gradients are measured for nobody")

    monkeypatch.setattr(gradients, "sketch_gradients", measured_anyway)
    inputs, outputs = trained(method)
    select = SELECT.model_copy(update={"signal": "energy"})
    result = re_evaluate(inputs, outputs, replace(SECTIONS, select=select), 1, rounds, 1)
    for folder in (outputs.next_rank_map, outputs.next_adapter):
        (only,) = folder.iterdir()
        assert only.name == "none.txt"
        assert only.read_text() == f"no round follows round 1 of {method}\n"
    assert result.rounds[0].changes == []


def test_where_a_round_follows_its_rank_map_and_adapter_are_made(trained: Make) -> None:
    inputs, outputs = trained()
    sections = replace(SECTIONS, select=SELECT.model_copy(update={"signal": "energy"}))
    result = re_evaluate(inputs, outputs, sections, 1, 2, 1)
    following = RankMap.read(outputs.next_rank_map)
    assert following.round == 2 and following.changes == result.rounds[0].changes != []
    carried = adapters.read_adapter_weights(outputs.next_adapter)
    assert {name.rpartition(".")[0] for name in carried} == {m.module for m in following.active()}
    assert TrainingLog.read(outputs.next_adapter) == LOG


def test_what_training_used_up_leaves_and_what_enters_changes_nothing_yet(
    trained: Make, quantized: Path
) -> None:
    """All scores are of the model as it is now; the first map's own scores, which nothing reaches, decide nothing."""
    inputs, outputs = trained("hybrid")
    before = RankMap.read(inputs.rank_map)
    modules = [
        m.model_copy(update={"score": 1e9, "tier": "selected"}) if m.rank else m for m in before.modules
    ]
    before.model_copy(update={"modules": modules, "budget": 10**6}).write(inputs.rank_map)
    select = SELECT.model_copy(update={"signal": "energy", "percent": 25.0})
    result = re_evaluate(inputs, outputs, replace(SECTIONS, select=select), 1, 2, 1)
    following = RankMap.read(outputs.next_rank_map)
    model = adapters.attach(
        load_four_bit(quantized)[0], before, start=adapters.read_adapter_weights(inputs.adapter)
    )
    manifest = FourBitModel.read(quantized)
    sketches = calibration_sketches(model, manifest.modules, inputs.rows, select, 1)
    energy = {m.module: sketches[m.module].energy(4) for m in manifest.modules if m.module in sketches}
    for kind in {m.type for m in manifest.modules}:
        best = max(
            (m.module for m in manifest.modules if m.type == kind), key=lambda name: energy.get(name, -1)
        )
        assert [m.module for m in following.modules if m.type == kind and m.tier == "selected"] == [best]
    assert result.rounds[0].changes == following.changes
    assert all("by its gradient energy" in line for line in following.changes)
    carried = adapters.read_adapter_weights(outputs.next_adapter)
    entered = [m.module for m in following.trained() if m.module not in (Q0, DOWN)]
    assert len(entered) >= 5
    assert not any(carried[f"{name}.lora_B"].any() for name in entered)


def test_a_branch_is_not_scored_on_test_rows(
    trained: Make, quantized: Path, prepared: Path, tmp_path: Path
) -> None:
    inputs, outputs = trained()
    rows = with_test_rows(prepared, tmp_path / "rows")
    measurement = write_measurement(
        quantized, rows, SELECT, 1, tmp_path / "measurement", ("qlora",), EVALUATE
    )
    shutil.rmtree(rows / "test")
    result = re_evaluate(replace(inputs, rows=rows, measurement=measurement), outputs, SECTIONS, 1, 1, 1)
    assert result.base_test_loss == BaseMeasurement.read(measurement).test_loss
    assert result.headline()["base_test_loss"] == result.base_test_loss


def test_a_branch_keeps_the_rounds_before(trained: Make) -> None:
    inputs, outputs = trained()
    first = re_evaluate(inputs, outputs, SECTIONS, 1, 2, 1)
    again, last = trained(round=2)
    moved = Outputs(
        last.evaluation.with_name("second"),
        last.next_rank_map.with_name("r"),
        last.next_adapter.with_name("a"),
    )
    second = re_evaluate(replace(again, previous=outputs.evaluation), moved, SECTIONS, 2, 2, 1)
    assert [r.round for r in second.rounds] == [1, 2] and second.rounds[0] == first.rounds[0]
    assert second.train_seconds == 2.0
    assert Evaluation.read(moved.evaluation) == second


def test_inputs_of_another_base_model_rows_or_round_are_refused(trained: Make, tmp_path: Path) -> None:
    inputs, outputs = trained()
    for key in ("base_digest", "rows_digest"):
        base = BaseMeasurement.read(inputs.measurement).model_copy(update={key: "f" * 64})
        base.write(tmp_path / "foreign")
        with pytest.raises(InputError, match=rf"^measurement {key}: 'ffffffffffff'"):
            re_evaluate(replace(inputs, measurement=tmp_path / "foreign"), outputs, SECTIONS, 1, 1, 1)
    with pytest.raises(InputError, match=r"^round: '2': expected 1, that of the rank map"):
        re_evaluate(inputs, outputs, SECTIONS, 2, 2, 1)
