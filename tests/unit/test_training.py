"""Training: same seed, same numbers; the best adapter is kept."""

from pathlib import Path

import torch
from spectraqlora import adapters
from spectraqlora.artifacts import TrainingLog
from spectraqlora.settings import EvaluateSettings, TrainSettings
from spectraqlora.train.training import train

from tests.unit.test_adapters import DOWN, Q0, rank_map


def test_same_seed_same_numbers(quantized: Path, prepared: Path, tmp_path: Path) -> None:
    rank_map(quantized, {Q0: 4, DOWN: 4}).write(tmp_path / "ranks")
    settings, logs = TrainSettings(max_steps=6, evaluations=3), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        logs.append(
            train(
                quantized,
                prepared,
                tmp_path / "ranks",
                settings,
                EvaluateSettings(),
                seed,
                1,
                tmp_path / name,
            )
        )
    first, second = (adapters.read_pairs(tmp_path / name) for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert logs[0].loss_curve == logs[1].loss_curve != logs[2].loss_curve
    assert logs[0].best_eval_loss == min(loss for _, loss in logs[0].eval_curve)
    assert TrainingLog.read(tmp_path / "a") == logs[0]
