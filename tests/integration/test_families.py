"""Every family through all steps: four methods, two rounds, merge, and reload by transformers and peft alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from spectraqlora.artifacts import Evaluation, FourBitModel, MergedModel
from spectraqlora.errors import InputError
from spectraqlora.settings import (
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    SelectSettings,
    SnrSettings,
    TrackingSettings,
    TrainSettings,
)
from spectraqlora.snr.table import read_table
from spectraqlora.steps.merge_export.merge import Inputs as MergeInputs
from spectraqlora.steps.merge_export.merge import merge_export
from spectraqlora.steps.prepare_data.prepare import prepare
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora.steps.re_evaluate.evaluate import Inputs as Trained
from spectraqlora.steps.re_evaluate.evaluate import Outputs, Sections, re_evaluate
from spectraqlora.steps.register.register import Inputs as Registration
from spectraqlora.steps.register.register import register
from spectraqlora.steps.select_layers.select import Inputs as Selection
from spectraqlora.steps.select_layers.select import select
from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze
from spectraqlora.steps.train.request import Inputs as TrainInputs
from spectraqlora.steps.train.request import TrainRequest
from spectraqlora.steps.train.training import train
from spectraqlora.tracking.registered_model import download_model, load_model
from spectraqlora.tracking.registry import Registry
from spectraqlora.tracking.runs import Tracker
from spectraqlora_pipelines.dags.branch import unrolled

from tests.architectures import ARCHITECTURES, written
from tests.families import FAMILIES, UNFORESEEN, write_family, write_own_code
from tests.measured import write_measurement

METHODS = ("qlora", "hybrid", "alors", "sgm")
SELECT = SelectSettings(rank=4, rank_high=4, rank_low=2, calibration_batches=2, sketch_size=64)
TRAIN = TrainSettings(max_steps=4, evaluations=1, learning_rate=5e-3)
EVALUATE = EvaluateSettings(accuracy_rows=2, max_new_tokens=4)
SHARE_OF_LINEAR_WEIGHTS = 0.999
QUICK = ("llama", "gpt2", "falcon", "t5", "qwen3-moe")

RELOAD = """
import json, sys
sys.modules["spectraqlora"] = None
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

def compare(base, merged, adapter):
    config = AutoConfig.from_pretrained(merged)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    ids = torch.arange(3, 23)[None]
    more = {"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {}
    with torch.no_grad():
        plain = kind.from_pretrained(base, dtype=torch.float32).eval()
        untrained = plain(input_ids=ids, **more).logits
        one = kind.from_pretrained(merged, dtype=torch.float32).eval()(input_ids=ids, **more).logits
        two = PeftModel.from_pretrained(plain, adapter).eval()(input_ids=ids, **more).logits
    scale = float(two.abs().max())
    moved = float((two - untrained).abs().max()) / scale
    return {"moved": moved, "gap": float((one - two).abs().max()) / scale}

for line in sys.stdin:
    print("compared " + json.dumps(compare(*json.loads(line))), flush=True)
"""

Compare = Callable[[Path, Path, Path], dict[str, float]]


@pytest.fixture(scope="module")
def reload() -> Iterator[Compare]:
    """Loads base, merged model and adapter in a process without this project: how far logits lie apart."""
    process = subprocess.Popen(
        [sys.executable, "-c", RELOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None

    def compare(*folders: Path) -> dict[str, float]:
        process.stdin.write(json.dumps([str(folder) for folder in folders]) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("compared "):
                found: dict[str, float] = json.loads(line.removeprefix("compared "))
                return found
        raise AssertionError("the exported model does not load")

    yield compare
    process.kill()
    process.communicate()


def _inputs(family: str, rows: Path, work: Path) -> FourBitModel:
    """Base, 4-bit model, data and SNR table of a family."""
    return _first_steps(ModelSettings(base_model=str(write_family(family, work / "base"))), rows, work)


def _first_steps(settings: ModelSettings, rows: Path, work: Path) -> FourBitModel:
    for name in ("quantized", "outline", "data", "table"):
        (work / name).mkdir()
    manifest = quantize(settings, work / "quantized", work / "outline")
    prepare(DataSettings(source=str(rows)), work / "outline", 1, work / "data")
    analyze(Inputs(work / "outline"), SnrSettings(), work / "table")
    return manifest


def _merge(method: str, result: Evaluation, work: Path) -> MergedModel:
    exported = work / "exported"
    exported.mkdir()
    winner = work / "winner"
    shutil.copytree(work / method / "adapter2", winner / "adapter")
    result.write(winner)
    merged = merge_export(MergeInputs(work / "quantized", work / "data", winner), EVALUATE, exported)
    assert MergedModel.read(exported) == merged
    # The adapter was scored on the 4-bit weights; merged into them it is the same model.
    assert merged.eval_loss_quantized == pytest.approx(result.eval_loss, rel=1e-3)
    return merged


def _export(method: str, result: Evaluation, work: Path, reload: Compare) -> None:
    merged, exported = _merge(method, result, work), work / "exported"
    found = reload(work / "base", exported / "merged", exported / "adapter")
    assert found["moved"] > 1e-3
    if merged.merged_into == "original":
        assert found["gap"] < 1e-3


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.e2e) for name in (*FAMILIES, *UNFORESEEN)],
)
def test_a_family_goes_through_every_step(
    family: str, tiny_rows: Path, tmp_path: Path, reload: Compare
) -> None:
    manifest = _inputs(family, tiny_rows, tmp_path)
    assert all(m.four_bit for m in manifest.modules)
    linear = sum(m.out_features * m.in_features for m in manifest.modules)
    assert manifest.four_bit_parameters >= SHARE_OF_LINEAR_WEIGHTS * linear
    assert {m.module for m in manifest.modules} <= set(read_table(tmp_path / "table")["module"])
    results = {}
    for method in METHODS:
        results[method] = _branch(method, tmp_path)
        assert results[method].eval_loss < results[method].base_eval_loss
        assert len(results[method].rounds) == unrolled(method, 2)
    _export("hybrid", results["hybrid"], tmp_path, reload)


@pytest.mark.parametrize(
    ("variant", "ratio"),
    [("rslora", 1.0), pytest.param("dora", 1.0, marks=pytest.mark.e2e), pytest.param("dora", 4.0)],
)
def test_variants_of_lora_go_through_two_rounds_and_merge(
    variant: str, ratio: float, tiny_rows: Path, tmp_path: Path, reload: Compare
) -> None:
    _inputs("llama", tiny_rows, tmp_path)
    select_ = SELECT.model_copy(update={"variant": variant})
    train_ = TRAIN.model_copy(update={"lora_plus_ratio": ratio, "weight_decay": 0.01})
    result = _branch("alors", tmp_path, select_, train_)
    assert result.eval_loss < result.base_eval_loss
    config = json.loads((tmp_path / "alors" / "adapter2" / "adapter_config.json").read_text())
    assert config["use_rslora"] == (variant == "rslora") and config["use_dora"] == (variant == "dora")
    _export("alors", result, tmp_path, reload)


def test_a_model_with_code_of_its_own_goes_through_every_step_where_it_is_trusted(
    tiny_rows: Path, tmp_path: Path
) -> None:
    base = ModelSettings(base_model=str(write_own_code(tmp_path / "base")))
    with pytest.raises(InputError, match=r"model\.trust_remote_code=true runs it"):
        quantize(base, tmp_path / "refused", tmp_path / "outline")
    trusted = base.model_copy(update={"trust_remote_code": True})
    assert _first_steps(trusted, tiny_rows, tmp_path).trust_remote_code
    merged = _merge("hybrid", _branch("hybrid", tmp_path), tmp_path)
    assert merged.trust_remote_code
    inputs = Registration(rows=tmp_path / "data", winner=tmp_path / "winner", exported=tmp_path / "exported")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for form in ("merged", "adapter"):
        tracking = TrackingSettings(uri=uri, registered_model=form, registered_form=form)
        register(Tracker(tracking, form), inputs, {})
        registry = Registry(tracking)
        folder = download_model(tracking, registry.version("challenger"), tmp_path / f"registered-{form}")
        with pytest.raises(InputError, match="without code of its own"):
            load_model(folder)


def test_a_family_that_looks_ahead_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = write_family("bert", tmp_path / "base")
    with pytest.raises(InputError, match=r"model.base_model.*looks ahead"):
        quantize(ModelSettings(base_model=str(base)), tmp_path / "quantized", tmp_path / "outline")
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("name", ["mamba", "gemma-3n"])
def test_weights_that_are_read_past_their_layers_are_not_packed_and_would_be_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings(base_model=str(written(ARCHITECTURES[name], tmp_path / "base")))
    manifest = quantize(settings, tmp_path / "four_bit", tmp_path / "outline")
    past = {"mamba": "dt_proj", "gemma-3n": "correction_coefs"}[name]
    assert any(past in parameter for parameter in manifest.unquantized)
    assert not any(past in info.module for info in manifest.modules)
    monkeypatch.setattr("spectraqlora.models.families._READ_PAST", {})
    with pytest.raises(InputError, match=r"computes from 4-bit weights; this one fails"):
        quantize(settings, tmp_path / "refused", tmp_path / "outline")


def _branch(
    method: str, work: Path, select_: SelectSettings = SELECT, train_: TrainSettings = TRAIN
) -> Evaluation:
    """A branch of two rounds: `adapterN`, `evalN` and so on below the method's folder."""
    quantized, data, table = (work / name for name in ("quantized", "data", "table"))
    measurement = work / "measurement"
    if not measurement.exists():
        write_measurement(quantized, data, select_, 1, measurement, evaluate=EVALUATE)
    (work / method / "ranks1").mkdir(parents=True)
    chosen = Selection(work / "outline", table, measurement)
    select(method, chosen, select_, 1, work / method / "ranks1")
    sections = Sections(EVALUATE, select_, SnrSettings())
    carried = previous = None
    for number in range(1, unrolled(method, 2) + 1):
        ranks, adapter = (work / method / f"{name}{number}" for name in ("ranks", "adapter"))
        outputs = Outputs(
            work / method / f"eval{number}",
            work / method / f"ranks{number + 1}",
            work / method / f"carried{number}",
        )
        request = TrainRequest(TrainInputs(quantized, data, ranks, carried), adapter, 1, 2, train_, EVALUATE)
        train(request)
        inputs = Trained(quantized, data, ranks, adapter, table, measurement, previous)
        result = re_evaluate(inputs, outputs, sections, number, 2, 1)
        carried, previous = outputs.next_adapter, outputs.evaluation
    return result


def test_falcon_computes_the_same_from_plain_linear_layers(tmp_path: Path) -> None:
    from spectraqlora.models.families import plain_linears
    from transformers import AutoModelForCausalLM

    base = write_family("falcon", tmp_path / "base")
    ids = torch.arange(3, 23)[None]
    own = AutoModelForCausalLM.from_pretrained(base)
    with plain_linears():
        plain = AutoModelForCausalLM.from_pretrained(base)
    assert type(own.transformer.h[0].mlp.dense_h_to_4h) is not torch.nn.Linear
    assert type(plain.transformer.h[0].mlp.dense_h_to_4h) is torch.nn.Linear
    assert torch.equal(own(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_experts_are_packed_and_counted_and_measured_one_by_one(tmp_path: Path) -> None:
    base = write_family("qwen3-moe", tmp_path / "base")
    (tmp_path / "quantized").mkdir()
    manifest = quantize(ModelSettings(base_model=str(base)), tmp_path / "quantized", tmp_path / "outline")
    assert manifest.four_bit_parameters > 4 * 4 * 3 * 64 * 64
    assert not any("experts" in name for name in manifest.unquantized)
    analyze(Inputs(tmp_path / "outline"), SnrSettings(), tmp_path / "table")
    table = read_table(tmp_path / "table")
    experts = table[table["type"].str.contains("experts")]
    assert len(experts) == 4 * 4 * 3
    assert FourBitModel.read(tmp_path / "quantized").modules == manifest.modules
