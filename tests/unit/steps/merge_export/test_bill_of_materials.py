"""The bill of materials beside an exported model, and its signature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from spectraqlora import signing
from spectraqlora.artifacts import Evaluation, FourBitModel, MergedModel, PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import file_digest
from spectraqlora.settings import EvaluateSettings, ExportSettings
from spectraqlora.steps.merge_export.bom import BOM, bill_of_materials
from spectraqlora.steps.merge_export.merge import Inputs, merge_export

from tests.keys import write_keys
from tests.unit.steps.merge_export.test_merge import winner

__all__ = ["winner"]


def faults(document: dict[str, Any]) -> str:
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))
    return str(found or "")


def test_the_validator_finds_what_is_wrong() -> None:
    assert faults({"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [{"type": "nothing"}]})


def test_an_export_is_signed_with_its_card_and_bill_of_materials(
    winner: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path)
    monkeypatch.setenv(signing.SIGNING_KEY, str(private))
    monkeypatch.setenv("SPECTRAQLORA_REVISION", "0123abc")
    monkeypatch.setenv("SPECTRAQLORA_IMAGE_REFERENCE", f"registry/merge-export@sha256:{'7' * 64}")
    (tmp_path / "exported").mkdir()
    inputs = Inputs(winner / "four_bit", prepared, winner / "winner")
    result = merge_export(
        inputs, EvaluateSettings(), tmp_path / "exported", ExportSettings(signature="required")
    )
    merged = tmp_path / "exported" / "merged"
    by = signing.fingerprint(public.read_text())
    assert result.signed_by == by
    for name in ("merged", "adapter"):
        assert signing.verify(tmp_path / "exported" / name, public.read_text()) == by
        assert by in (tmp_path / "exported" / name / "README.md").read_text()

    bill = json.loads((merged / BOM).read_text())
    assert faults(bill) == ""
    parts = {part["bom-ref"]: part for part in bill["components"]}
    base, rows = FourBitModel.read(winner / "four_bit"), PreparedRows.read(prepared)
    assert parts["base"]["hashes"] == [{"alg": "SHA-256", "content": base.base_digest}]
    assert parts["data"]["hashes"][0]["content"] == rows.digest
    assert parts["image-merge-export"]["hashes"] == [{"alg": "SHA-256", "content": "7" * 64}]
    assert bill["dependencies"] == [{"ref": "model", "dependsOn": list(parts)}]
    component = bill["metadata"]["component"]
    values = {entry["name"]: entry["value"] for entry in component["properties"]}
    assert values["spectraqlora:file.model.safetensors.sha256"] == file_digest(merged / "model.safetensors")
    assert values["spectraqlora:train.max_steps"] == "2" and values["spectraqlora:signed_by"] == by
    metrics = component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"eval_loss", "merged_eval_loss", "trainable_parameters"} <= {entry["type"] for entry in metrics}
    assert bill["metadata"]["tools"]["components"][0]["properties"][0]["value"] == "0123abc"
    assert str(tmp_path) not in json.dumps(bill) and str(winner) not in json.dumps(bill)


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: house-1\n---\n", "house-1"),
        ("# No front matter\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\n- a list\n---\n", "unknown"),
        ("---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_bases_license_is_what_its_card_says(
    card: str | None, known: str, winner: Path, prepared: Path, tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text("{}")
    manifest = FourBitModel.read(winner / "four_bit").model_copy(update={"source_path": str(tmp_path)})
    result = MergedModel(
        method="alors", base_digest="b", merged_into="original", adapter_eval_loss=1.0,
        eval_loss_quantized=1.0, eval_loss_original=1.0, verified_eval_loss=1.0,
    )  # fmt: skip
    evaluated = Evaluation.read(winner / "winner")
    bills = [
        bill_of_materials(result, evaluated, manifest, PreparedRows.read(prepared), tmp_path)
        for _ in range(2)
    ]
    assert bills[0] == bills[1] and faults(bills[0]) == "", "the same run writes the same bytes"
    (base,) = [part for part in bills[0]["components"] if part["bom-ref"] == "base"]
    assert base["licenses"] == [{"license": {"name": known}}]


def test_a_key_that_cannot_be_used_is_refused_before_the_work(
    winner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signing.SIGNING_KEY, str(tmp_path / "gone"))
    with pytest.raises(InputError, match="SPECTRAQLORA_SIGNING_KEY"):
        merge_export(Inputs(tmp_path, tmp_path, tmp_path), EvaluateSettings(), tmp_path)
