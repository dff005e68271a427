"""Model shapes: parameters and 4-bit sizes by hand, and what is no model."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora.planning.shape import ModelShape, config_of


def test_a_7b_model_in_four_bits_takes_what_its_numbers_say() -> None:
    shape = ModelShape(config_of("7B"), "bfloat16")
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    other = 2 * 32_000 * 4096 + 65 * 4096
    assert shape.four_bit == linear and shape.parameters == linear + other
    constants = linear // 64 + -(-linear // 64 // 256) * 4
    assert shape.weight_bytes == linear // 2 + constants + 2 * other


@pytest.mark.parametrize(("name", "billions"), [("7B", 6.74), ("13b", 13.02), ("65B", 65.29), ("70B", 68.98)])
def test_the_named_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert ModelShape(config_of(name), "bfloat16").parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("source", ["8B", "./none", "/nowhere/model"])
def test_a_model_without_a_config_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"model\.base_model") as caught:
        config_of(source)
    assert "\n" not in str(caught.value) and "70B" in str(caught.value)
