"""A language model that also sees goes through the steps: adapters in the language model, the export complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from spectraqlora.methods.catalogue import method
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.settings import EvaluateSettings, ModelSettings, SelectSettings, SnrSettings
from spectraqlora.snr.table import read_table
from spectraqlora.steps.merge_export.merge import Inputs as MergeInputs
from spectraqlora.steps.merge_export.merge import merge_export
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze

from tests.unit.models.test_adapters import randomize
from tests.unit.models.test_architectures import ARCHITECTURES, written
from tests.unit.results import evaluation


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gemma-3-that-sees", "Gemma3ForConditionalGeneration"), ("llava", "LlavaForConditionalGeneration")],
)
def test_the_language_model_is_adapted_and_all_of_the_model_exported(
    name: str, kind: str, prepared: Path, tmp_path: Path
) -> None:
    base = written(ARCHITECTURES[name], tmp_path / "base")
    manifest = quantize(ModelSettings(base_model=str(base)), tmp_path / "four_bit", tmp_path / "outline")
    assert {info.layer for info in manifest.modules} == {0, 1} and len(manifest.modules) == 14
    (tmp_path / "table").mkdir()
    analyze(Inputs(tmp_path / "outline"), SnrSettings(), tmp_path / "table")
    assert set(read_table(tmp_path / "table")["module"]) == {info.module for info in manifest.modules}
    ranks = method("qlora").first_ranks(manifest.modules, {}, SelectSettings(rank=4), 1, {})
    ranks = ranks.model_copy(update={"base_digest": manifest.base_digest})
    wrapped = adapters.attach(load_four_bit(tmp_path / "four_bit")[0], ranks)
    randomize(wrapped)
    ids = torch.arange(3, 19)[None]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    adapters.save(wrapped, tmp_path / "winner" / "adapter", "base")
    evaluation("qlora", [1.0, 2.0], 100).write(tmp_path / "winner")
    (tmp_path / "exported").mkdir()
    inputs = MergeInputs(tmp_path / "four_bit", prepared, tmp_path / "winner")
    result = merge_export(inputs, EvaluateSettings(), tmp_path / "exported")
    merged = tmp_path / "exported" / "merged"
    model, info = getattr(transformers, kind).from_pretrained(merged, output_loading_info=True)
    assert type(model).__name__ == kind
    assert not any(info.values()), "nothing is missing, left over or of another shape"
    before, after = LocalTensors(base), LocalTensors(merged)
    assert set(before.names()) == set(after.names())
    changed = {name for name in before.names() if not torch.equal(before.load(name), after.load(name))}
    if result.merged_into == "original":
        assert changed == {info.tensor for info in manifest.modules}
    assert changed >= {info.tensor for info in manifest.modules}
