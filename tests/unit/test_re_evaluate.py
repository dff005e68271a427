"""Re-evaluation measures W + scaling·B·A, and the update itself."""

from pathlib import Path

import pytest
import torch
from spectraqlora.artifacts import FourBitModel, TrainingLog
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.settings import EvaluateSettings, SelectSettings, SnrSettings
from spectraqlora.snr.marchenko_pastur import statistics
from spectraqlora.snr.scan import tensors_of
from spectraqlora.steps.re_evaluate.evaluate import re_evaluate

from tests.unit.test_adapters import DOWN, Q0, randomize, rank_map


def test_the_snr_after_training_is_that_of_the_updated_weights(
    quantized: Path, prepared: Path, tmp_path: Path
) -> None:
    ranks = rank_map(quantized, {Q0: 4, DOWN: 4})
    wrapped = adapters.attach(load_four_bit(quantized)[0], ranks)
    randomize(wrapped)
    folders = [tmp_path / name for name in ("ranks", "adapter", "evaluation", "next-ranks", "next-adapter")]
    for folder in folders:
        folder.mkdir()
    ranks.write(folders[0])
    adapters.save(wrapped, folders[1], "base")
    TrainingLog(
        method="alors",
        round=1,
        trainable_parameters=1,
        train_seconds=1.0,
        train_tokens=1,
        train_tokens_per_second=1.0,
        peak_memory_bytes=1,
        best_eval_loss=1.0,
        loss_curve=[],
        eval_curve=[],
    ).write(folders[1])
    settings = EvaluateSettings(accuracy_rows=0, energy=1.0)
    select = SelectSettings(signal="spectrum", rank=4, rank_high=4, rank_low=2)
    result = re_evaluate(
        quantized, prepared, folders[0], folders[1], settings, select, SnrSettings(), 1, *folders[2:]
    )
    manifest = FourBitModel.read(quantized)
    weights = dict(tensors_of(LocalTensors(Path(manifest.source_path)), manifest.modules))
    trained = adapters.read_adapter_weights(folders[1])
    for name, weight in weights.items():
        update = torch.zeros_like(weight)
        if name in (Q0, DOWN):
            update = 2.0 * trained[f"{name}.lora_B"] @ trained[f"{name}.lora_A"]
            spectrum = result.rounds[0].update_spectrum[name]
            packed = result.rounds[0].update_spectrum[name]["relative_norm"]
            assert packed == pytest.approx(float(update.norm() / weight.norm()), rel=0.02)
            assert spectrum["energy_rank"] == 4
            assert statistics(weight + update).snr != pytest.approx(statistics(weight).snr, rel=1e-2)
        assert result.snr_after[name] == pytest.approx(statistics(weight + update).snr, rel=1e-4)
