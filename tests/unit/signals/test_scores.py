"""What ranks modules, by hand."""

import pytest
import torch
from spectraqlora.signals.gradients import GradientSketch
from spectraqlora.signals.scores import combined, task_scores

from tests.modules import modules

MODULES = modules(2, q=(32, 32))


def test_task_scores_by_hand() -> None:
    # Singular values 3, 2, 1: the two largest squares are 13, over 2 x (32 + 32) parameters.
    sketch = GradientSketch(torch.eye(3), torch.diag(torch.tensor([3.0, 1.0, 2.0])), 7.0)
    name = MODULES[0].module
    energy = task_scores("energy", MODULES, {name: sketch}, 2)
    assert energy == {name: (pytest.approx(13 / 128), 7.0)}
    assert task_scores("gradient_snr", MODULES, {name: sketch}, 2)[name][0] == 7.0


def test_the_combined_signal_is_the_mean_place() -> None:
    one = {"a": (1.0, 0.0), "b": (2.0, 0.0), "c": (3.0, 0.0)}
    two = {"a": (9.0, 0.0), "b": (8.0, 0.0), "c": (1.0, 0.0), "d": (0.0, 0.0)}
    # Places of the first: a 0, b 1/2, c 1; of the second: d 0, c 1/3, b 2/3, a 1.
    scores = {name: score for name, (score, _) in combined(one, two).items()}
    assert scores == pytest.approx({"a": 1 / 2, "b": 7 / 12, "c": 2 / 3})
