"""Every architecture of models/README.md's table: through the steps to a merged model that loads by its own class."""

from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES
from tests.journey import journey

QUICK = ("gemma-3n", "granite-4", "llama-4-that-sees")
"""What differs most: weights read past layers, a state-space mixer with experts, a vision tower."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.e2e) for name in ARCHITECTURES]
)
def test_an_architecture_is_trained_and_merged_into_the_model_that_was_trained(
    name: str, tmp_path: Path
) -> None:
    result = journey(ARCHITECTURES[name], tmp_path)
    assert result.moved > 1e-3
    assert result.gap < 1e-5
