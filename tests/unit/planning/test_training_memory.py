"""Memory of training: what it grows and shrinks with."""

from pathlib import Path
from typing import Any

import pytest
from spectraqlora.planning.shape import ModelShape, config_of
from spectraqlora.planning.training import TrainingMemory, surrogate_map, training

from tests.small import small


def test_memory_follows_rank_batch_length_checkpointing_and_optimizer(tiny_model: Path) -> None:
    shape = ModelShape(config_of(str(tiny_model)), "float32")

    def of(method: str = "qlora", **sections: Any) -> TrainingMemory:
        settings = small(**sections)
        ranks = surrogate_map(method, shape, settings)
        return training(shape, ranks, settings, cuda=False)

    plain = of()
    rank_8 = 4 * 8 * sum(m.in_features + m.out_features for m in shape.modules)
    assert (plain.adapters, plain.gradients, plain.optimizer) == (rank_8, rank_8, 2 * rank_8)
    assert of(train={"batch_size": 16}).activations == pytest.approx(2 * plain.activations, rel=0.01)
    longest, half, beyond = (of(data={"max_length": n, "pack": True}).activations for n in (128, 64, 4096))
    assert longest == pytest.approx(2 * half, rel=0.01) and beyond == longest, "the model has 128 positions"
    some, every = (of(train={"gradient_checkpointing": choice}) for choice in ("some", "on"))
    assert (
        every.activations < plain.activations / 3 and every.activations < some.activations < plain.activations
    )
    assert of(method="hybrid").total < plain.total
    # alors recomputes unless that is turned off.
    auto, on, off = (of("alors", train={"gradient_checkpointing": how}) for how in ("auto", "on", "off"))
    assert auto == on and auto.activations < off.activations / 3
    assert of(train={"optimizer": "adamw_8bit"}).optimizer == plain.optimizer // 4
