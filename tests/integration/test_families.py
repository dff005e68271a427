"""Every family through all steps: four methods, two rounds, merge, and reload by transformers and peft alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spectraqlora.artifacts import Evaluation, MergedModel, QuantizedModel
from spectraqlora.merge_export.merge import merge_export
from spectraqlora.prepare_data.prepare import prepare
from spectraqlora.quantize_load.quantize import quantize
from spectraqlora.re_evaluate.evaluate import re_evaluate
from spectraqlora.select_layers.select import select
from spectraqlora.settings import (
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    SelectSettings,
    SnrSettings,
    TrainSettings,
)
from spectraqlora.snr.table import read_table
from spectraqlora.snr_analyze.analyze import analyze
from spectraqlora.train.training import train

from tests.families import FAMILIES, write_family

METHODS = ("qlora", "hybrid", "alors", "sgm")
SELECT = SelectSettings(rank=4, rank_high=4, rank_low=2, calibration_batches=2, sketch_size=64)
TRAIN = TrainSettings(max_steps=4, evaluations=1, learning_rate=5e-3)
EVALUATE = EvaluateSettings(accuracy_rows=2, max_new_tokens=4)
SHARE_OF_LINEAR_WEIGHTS = 0.999

RELOAD = """
import sys
sys.modules["spectraqlora"] = None
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
base, merged, adapter = sys.argv[1:4]
config = AutoConfig.from_pretrained(merged)
kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
ids = torch.arange(3, 23)[None]
more = {"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {}
with torch.no_grad():
    plain = kind.from_pretrained(base, dtype=torch.float32).eval()
    untrained = plain(input_ids=ids, **more).logits
    one = kind.from_pretrained(merged, dtype=torch.float32).eval()(input_ids=ids, **more).logits
    two = PeftModel.from_pretrained(plain, adapter).eval()(input_ids=ids, **more).logits
assert not torch.allclose(one, untrained, atol=1e-3), "the export equals the base"
gap = float((one - two).abs().max() / two.abs().max())
assert gap < float(sys.argv[4]), gap
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_every_step(family: str, tiny_rows: Path, tmp_path: Path) -> None:
    base = write_family(family, tmp_path / "base")
    quantized, data, table = (tmp_path / name for name in ("quantized", "data", "table"))
    for folder in (quantized, data, table):
        folder.mkdir()
    manifest = quantize(ModelSettings(base_model=str(base)), quantized)
    linear = sum(m.out_features * m.in_features for m in manifest.modules)
    assert manifest.four_bit_parameters >= SHARE_OF_LINEAR_WEIGHTS * linear
    assert all(m.four_bit for m in manifest.modules)
    prepare(DataSettings(source=str(tiny_rows)), str(quantized / "model"), 1, data)
    analyze(SnrSettings(), quantized, table)
    measured = set(read_table(table)["module"])
    assert {m.module for m in manifest.modules} <= measured

    results = {}
    for method in METHODS:
        results[method] = _branch(method, quantized, data, table, tmp_path / method)
        assert results[method].eval_loss < results[method].base_eval_loss
    exported = tmp_path / "exported"
    exported.mkdir()
    adapter = tmp_path / "hybrid" / "adapter2"
    merged = merge_export(quantized, data, adapter, results["hybrid"], EVALUATE, exported)
    assert MergedModel.read(exported) == merged
    # Merged into the original weights both hold the same numbers; into the quantized ones they may differ.
    tolerance = "1e-3" if merged.merged_into == "original" else "0.5"
    arguments = [str(base), str(exported / "merged"), str(exported / "adapter"), tolerance]
    done = subprocess.run([sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _branch(method: str, quantized: Path, data: Path, table: Path, work: Path) -> Evaluation:
    folders = {}
    for name in ("ranks1", "adapter1", "eval1", "ranks2", "carried", "adapter2", "eval2", "ranks3", "last"):
        folders[name] = work / name
        folders[name].mkdir(parents=True)
    select(method, quantized, data, table, SELECT, 1, folders["ranks1"])
    train(quantized, data, folders["ranks1"], TRAIN, EVALUATE, 1, 2, folders["adapter1"])
    re_evaluate(
        quantized, data, folders["ranks1"], folders["adapter1"], EVALUATE, SELECT, SnrSettings(), 1,
        folders["eval1"], folders["ranks2"], folders["carried"],
    )  # fmt: skip
    train(quantized, data, folders["ranks2"], TRAIN, EVALUATE, 1, 2, folders["adapter2"], folders["carried"])
    return re_evaluate(
        quantized, data, folders["ranks2"], folders["adapter2"], EVALUATE, SELECT, SnrSettings(), 1,
        folders["eval2"], folders["ranks3"], folders["last"], folders["eval1"],
    )  # fmt: skip


def test_falcon_computes_the_same_from_plain_linear_layers(tmp_path: Path) -> None:
    from spectraqlora.families import plain_linears
    from transformers import AutoModelForCausalLM

    base = write_family("falcon", tmp_path / "base")
    ids = torch.arange(3, 23)[None]
    own = AutoModelForCausalLM.from_pretrained(base)
    with plain_linears():
        plain = AutoModelForCausalLM.from_pretrained(base)
    assert type(own.transformer.h[0].mlp.dense_h_to_4h) is not torch.nn.Linear
    assert type(plain.transformer.h[0].mlp.dense_h_to_4h) is torch.nn.Linear
    assert torch.equal(own(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_experts_are_counted_and_measured_one_by_one(tmp_path: Path) -> None:
    base = write_family("qwen3-moe", tmp_path / "base")
    (tmp_path / "quantized").mkdir()
    manifest = quantize(ModelSettings(base_model=str(base)), tmp_path / "quantized")
    assert manifest.four_bit_parameters < manifest.parameters
    assert any("experts" in name for name in manifest.unquantized)
    analyze(SnrSettings(), tmp_path / "quantized", tmp_path / "table")
    table = read_table(tmp_path / "table")
    experts = table[table["type"].str.contains("experts")]
    assert len(experts) == 4 * 4 * 3
    assert QuantizedModel.read(tmp_path / "quantized").modules == manifest.modules
