"""Artifacts are contracts: what is missing, cut short, foreign or of an older version is refused in one line."""

import shutil
from pathlib import Path

import pytest
from spectraqlora.artifacts import SCHEMA_VERSION, BaseMeasurement, FourBitModel, ModelOutline
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_tokenizer

RECORDED = Path(__file__).parent / "recorded" / "quantized-0.1.0.json"
"""What quantize-load of version 0.1.0 wrote."""


@pytest.mark.parametrize("kind", [FourBitModel, ModelOutline])
def test_artifacts_of_version_0_1_0_are_refused_in_a_line_that_says_so(
    kind: type[ModelOutline], tmp_path: Path
) -> None:
    shutil.copy(RECORDED, tmp_path / "manifest.json")
    with pytest.raises(InputError) as refused:
        kind.read(tmp_path)
    assert str(refused.value) == (
        f"{kind.__name__}: '{tmp_path}/manifest.json': expected schema version {SCHEMA_VERSION}; "
        "it comes from version 0.1.0 and has to be made anew"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "a readable JSON document; it is missing or cut short"),
        ('{"schema_version": 2, "loss"', "a readable JSON document; it is missing or cut short"),
        ("[]", "expected schema version 2"),
        ('{"schema_version": 3}', "expected schema version 2"),
        ('{"schema_version": 2}', "BaseMeasurement base_digest"),
    ],
)
def test_what_is_no_measurement_is_refused_in_one_line(
    text: str | None, expected: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / BaseMeasurement.filename()).write_text(text)
    with pytest.raises(InputError) as refused:
        BaseMeasurement.read(tmp_path)
    assert expected in str(refused.value) and "0.1.0" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [FourBitModel, ModelOutline])
def test_an_outline_and_a_4_bit_model_are_not_taken_for_each_other(
    kind: type[ModelOutline], quantized: Path, outline: Path
) -> None:
    folder = outline if kind is FourBitModel else quantized
    with pytest.raises(InputError) as refused:
        kind.read(folder)
    message = str(refused.value)
    assert message.startswith(f"{kind.__name__} ") and "it is another artifact's, or malformed" in message
    assert str(folder / "manifest.json") in message


def test_an_outline_is_the_4_bit_model_without_its_weights(quantized: Path, outline: Path) -> None:
    names = {path.name for path in (outline / "model").iterdir()}
    assert names == {path.name for path in (quantized / "model").iterdir()} - {"model.safetensors"}
    assert sum(path.stat().st_size for path in outline.rglob("*") if path.is_file()) < 200_000
    light, full = ModelOutline.read(outline), FourBitModel.read(quantized)
    assert light.model_dump().items() <= full.model_dump().items()
    assert len(light.modules) == 28
    text = "a person and a number: 17"
    tokenizers = [load_tokenizer(folder / "model") for folder in (outline, quantized)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_a_measurement_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = BaseMeasurement(
        base_digest="b", rows_digest="r", loss=2.0, perplexity=7.4, accuracy=None,
        row_losses=[4.0, 2.0], row_tokens=[2, 1], sketched=False,
    )  # fmt: skip
    written.write(tmp_path)
    assert BaseMeasurement.read(tmp_path) == written
