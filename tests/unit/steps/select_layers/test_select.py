"""select-layers: rank maps from a table and stored sketches, equal to those of version 0.1.0."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from spectraqlora.artifacts import GRADIENT_INIT, BaseMeasurement, LinearModule, ModelOutline, RankMap
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.modules import candidates
from spectraqlora.scoring.batches import Collator, load_rows
from spectraqlora.settings import SelectSettings, SnrSettings
from spectraqlora.signals.gradients import write_sketches
from spectraqlora.signals.scores import calibration_sketches
from spectraqlora.snr.table import COLUMNS, FILENAME
from spectraqlora.steps.select_layers.select import Inputs, select
from spectraqlora.steps.snr_analyze.analyze import Inputs as SnrInputs
from spectraqlora.steps.snr_analyze.analyze import analyze
from transformers import LlamaConfig, LlamaForCausalLM

from tests.measured import write_measurement

# Made by version 0.1.0, whose select-layers measured each method's gradients itself, from the model, rows and table
# that this module makes.
EXPECTED = json.loads((Path(__file__).parents[3] / "golden" / "rank_maps.json").read_text())


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()


def _write_rows(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in range(9, 25):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    Dataset.from_list(rows).save_to_disk(str(folder / "train"))


def _write_table(modules: list[LinearModule], folder: Path) -> None:
    """Some values infinite, some no numbers, and ties among the rest."""
    snr = [
        float("inf") if i % 11 == 3 else float("nan") if i % 13 == 5 else i * 37 % 41 / 8
        for i in range(len(modules))
    ]
    calibrated = [i * 29 % 43 / 16 for i in range(len(modules))]
    table = pd.DataFrame(dict.fromkeys(COLUMNS, 0) | {"module": [m.module for m in modules]})
    table["snr"], table["order"], table["calibrated"] = snr, snr, calibrated
    folder.mkdir()
    table.to_parquet(folder / FILENAME)


def _measurement(sketched: bool, base_digest: str = "b" * 64) -> BaseMeasurement:
    return BaseMeasurement(
        base_digest=base_digest, rows_digest="d" * 64, loss=1.0, perplexity=2.7, accuracy=None,
        row_losses=[1.0], row_tokens=[1], sketched=sketched,
    )  # fmt: skip


def _write_outline(modules: list[LinearModule], folder: Path) -> None:
    folder.mkdir()
    ModelOutline(
        source="base",
        revision="",
        source_path="base",
        base_digest="b" * 64,
        compute_dtype="float32",
        parameters=1,
        modules=modules,
    ).write(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outline, table and a measurement of all modules in one pass, as measure-base makes it for all branches."""
    work = tmp_path_factory.mktemp("select")
    model = _model()
    modules = candidates(model, "llama")
    _write_rows(work / "rows")
    _write_outline(modules, work / "outline")
    _write_table(modules, work / "table")
    select_settings = SelectSettings(**EXPECTED["common"])
    sketches = calibration_sketches(model, modules, work / "rows", select_settings, 1)
    write_sketches(sketches, work / "measurement")
    for name in ("measurement", "unmeasured"):
        _measurement(sketched=name == "measurement").write(work / name)
    return work


def _select(
    method: str, work: Path, output: Path, measurement: str = "measurement", **settings: Any
) -> RankMap:
    output.mkdir()
    chosen = SelectSettings(**(EXPECTED["common"] | settings))
    read = Inputs(work / "outline", work / "table", work / measurement)
    return select(method, read, chosen, 1, output)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{case['method']} {case['settings']}") for case in EXPECTED["cases"]]
)
def test_rank_maps_from_one_pass_are_those_of_a_pass_for_every_method(
    case: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    rank_map = _select(case["method"], inputs, tmp_path / "ranks", **case["settings"])
    count = len(rank_map.modules)
    assert [m.tier for m in rank_map.modules] == case["tiers"]
    assert [m.rank for m in rank_map.modules] == case["ranks"]
    assert [m.group for m in rank_map.modules] == case.get("groups", [None] * count)
    assert [m.alpha for m in rank_map.modules] == [2.0 * rank for rank in case["ranks"]]
    assert [m.lr_scale for m in rank_map.modules] == pytest.approx(
        case.get("lr_scales", [1.0] * count), rel=1e-5
    )
    scores, expected = [m.score for m in rank_map.modules], case.get("scores", [None] * count)
    assert [s is None for s in scores] == [s is None for s in expected]
    assert [s or 0.0 for s in scores] == pytest.approx([s or 0.0 for s in expected], rel=1e-3)
    starts = tmp_path / "ranks" / GRADIENT_INIT
    assert (sorted(load_file(starts)) if starts.exists() else []) == case["starts"]
    assert rank_map.base_digest == "b" * 64
    assert (tmp_path / "ranks" / "selected.txt").read_text().split() == [m.module for m in rank_map.active()]
    assert RankMap.read(tmp_path / "ranks") == rank_map


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sgm", {"signal": "spectrum"}),
        ("hybrid", {"signal": "energy"}),
        ("alors", {"signal": "combined"}),
        ("qlora", {"gradient_init": "on"}),
    ],
)
def test_missing_sketches_are_refused_with_what_to_do(
    method: str, settings: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"measurement: .*run measure-base again with {method}") as caught:
        _select(method, inputs, tmp_path / "ranks", measurement="unmeasured", **settings)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "ranks").iterdir())


@pytest.mark.parametrize(
    ("method", "settings"),
    [("qlora", {"signal": "energy"}), ("random", {"signal": "energy"}), ("hybrid", {"signal": "spectrum"})],
)
def test_sketches_that_a_method_does_not_need_change_nothing(
    method: str, settings: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    with_sketches = _select(method, inputs, tmp_path / "with", **settings)
    without = _select(method, inputs, tmp_path / "without", measurement="unmeasured", **settings)
    assert with_sketches == without
    assert not (tmp_path / "with" / GRADIENT_INIT).exists()


def test_settings_that_do_not_fit_the_model_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"select\.rank: '64': expected at most 16, the smallest side of model"
    ):
        _select("hybrid", inputs, tmp_path / "one", rank=64)
    with pytest.raises(InputError, match=r"method: 'magic': expected 'qlora', .* or 'random'"):
        _select("magic", inputs, tmp_path / "two")


def test_a_measurement_of_another_base_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    _measurement(sketched=False, base_digest="c" * 64).write(tmp_path / "foreign")
    foreign = Inputs(inputs / "outline", inputs / "table", tmp_path / "foreign")
    with pytest.raises(InputError, match=r"^measurement base_digest: 'c{12}': expected b{12}"):
        select("qlora", foreign, SelectSettings(rank=4), 1, tmp_path / "ranks")


def test_selecting_by_weights_loads_no_torch_and_no_transformers(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    program = f"""
import sys
from pathlib import Path
from spectraqlora.settings import SelectSettings
from spectraqlora.steps.select_layers.select import Inputs, select
work = Path({str(inputs)!r})
inputs = Inputs(work / "outline", work / "table", work / "unmeasured")
settings = SelectSettings(signal="spectrum", rank=4)
select("hybrid", inputs, settings, 1, Path({str(tmp_path)!r}) / "ranks")
assert not sys.modules.keys() & {{"torch", "transformers", "peft", "bitsandbytes"}}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_starts_from_the_leading_gradient_directions_of_its_group(
    quantized: Path, outline: Path, prepared: Path, tmp_path: Path
) -> None:
    analyze(SnrInputs(outline), SnrSettings(), tmp_path / "table")
    settings = SelectSettings(
        rank=4, sketch_size=256, calibration_batches=2, percent=100.0, gradient_init="on",
        similarity_of="gradient", similarity=-1.0,
    )  # fmt: skip
    (tmp_path / "ranks").mkdir()
    measurement = write_measurement(quantized, prepared, settings, 1, tmp_path / "measurement")
    rank_map = select(
        "sgm", Inputs(outline, tmp_path / "table", measurement), settings, 1, tmp_path / "ranks"
    )
    starts = load_file(tmp_path / "ranks" / GRADIENT_INIT)
    # With every cosine allowed, all modules of a type share one pair.
    groups = {m.group for m in rank_map.active()}
    assert len(starts) == len(groups) == 7
    members = [m.module for m in rank_map.active() if m.type == "self_attn.q_proj"]
    model, _ = load_four_bit(quantized)
    batches = Collator(0, None).batches(
        load_rows(prepared, "train").shuffle(seed=1), settings.calibration_rows, limit=2
    )
    full = model.dequantize().float()
    weights = [dict(full.named_modules())[name].weight.requires_grad_(True) for name in members]
    mean = torch.stack(
        [torch.stack(torch.autograd.grad(full(**batch).loss, weights)).mean(0) for batch in batches]
    ).mean(0)
    leading = torch.linalg.svd(mean).Vh[:4]
    a = starts[members[0]]
    cosines = torch.linalg.svdvals(a / a.norm(dim=1, keepdim=True) @ leading.T)
    assert cosines.min() > 0.999
