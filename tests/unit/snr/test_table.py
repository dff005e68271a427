"""Scanning checkpoints, Spectrum's files, and selection from a table."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from spectraqlora.artifacts import ModelOutline
from spectraqlora.errors import InputError
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.settings import SnrSettings
from spectraqlora.snr.scan import scan, scan_tensors
from spectraqlora.snr.spectrum_format import (
    norm_modules,
    read_spectrum_json,
    spectrum_json,
    unfrozen_yaml,
)
from spectraqlora.snr.table import best_first, order, read_given, read_table, top_modules, write_table
from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze

SHARED = Path(os.environ.get("SPECTRAQLORA_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
PUBLISHED = SHARED / "data" / "spectrum_snr"
needs_published = pytest.mark.skipif(
    not PUBLISHED.exists(), reason=f"Spectrum's published tables are not in {PUBLISHED}"
)


def test_a_scan_has_one_row_per_matrix_and_survives_parquet_and_json(
    tiny_model: Path, tmp_path: Path
) -> None:
    table = scan(LocalTensors(tiny_model))
    assert len(table) == 4 * 7
    assert set(table["type"]) >= {"self_attn.q_proj", "mlp.down_proj"}
    write_table(table, tmp_path)
    pd.testing.assert_frame_equal(read_table(tmp_path), table)
    assert (tmp_path / "heatmap.png").stat().st_size > 1000
    (tmp_path / "own.json").write_text(spectrum_json(table))
    again = read_spectrum_json(tmp_path / "own.json")
    assert dict(zip(again["module"], again["snr"], strict=True)) == pytest.approx(
        dict(zip(table["module"], table["snr"], strict=True))
    )


def test_top_modules_never_takes_nan_and_breaks_ties_at_infinity_by_the_calibrated_value() -> None:
    table = pd.DataFrame(
        {
            "module": list("abcd"),
            "type": ["t"] * 4,
            "snr": [math.nan, math.inf, math.inf, 1.0],
            "signal": [math.nan, 9.0, 9.0, 9.0],
            "s1": [1.0] * 4,
            "calibrated": [9.0, 1.0, 2.0, 3.0],
        }
    )
    table["order"] = order(table, "calibrated")
    assert top_modules(table, 25) == {"c"}
    assert top_modules(table, 100) == {"b", "c", "d"}


def by_spectrums_program(weight: torch.Tensor) -> float:
    """SNR as Spectrum's program computes it since April 2025 (`spectrum.py`, calculate_snr_for_layer): no noise is 1."""
    values = torch.linalg.svdvals(weight.double())
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64))
    rows, cols = weight.shape
    beta = min(rows, cols) / max(rows, cols)
    threshold = float((quartiles[1] - quartiles[0]) / 1.349 * (1 + math.sqrt(beta)))
    noise = float(values[values <= threshold].sum()) or 1.0
    return float(values[values > threshold].sum()) / noise / float(values[0])


def test_matrices_without_noise_are_ordered_as_spectrums_program_orders_them() -> None:
    generator = torch.Generator().manual_seed(3)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(
        10
    ):  # Narrow ones have no noise; of the others one value is small, its noise below 1 or above.
        weight = torch.randn(64, 256, generator=generator) * (0.02 + 0.03 * layer)
        weight[0] *= 1 + layer % 4
        if layer % 3 == 0:
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            values[-1] = values[-1] * 1e-3
            weight = left @ torch.diag(values) @ right
        weights[f"model.layers.{layer}.self_attn.v_proj"] = weight
    table = scan_tensors(weights.items())
    infinite = table["snr"].map(math.isinf)
    assert infinite.sum() >= 5 and (~infinite).sum() >= 3
    wanted = sorted(weights, key=lambda name: by_spectrums_program(weights[name]), reverse=True)
    assert list(best_first(table)["module"]) == wanted
    for percent in (20, 50, 80):
        assert top_modules(table, percent) == set(wanted[: int(len(wanted) * percent / 100)])
    calibrated = scan_tensors(weights.items(), ties="calibrated")
    ordered = best_first(calibrated)
    assert list(ordered["snr"].map(math.isinf)) == sorted(infinite, reverse=True), (
        "infinity before all others"
    )
    flat = ordered[ordered["snr"].map(math.isinf)]
    assert list(flat["calibrated"]) == sorted(flat["calibrated"], reverse=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: pd.concat([t, t[t["layer"] == 3].assign(module=lambda f: f["module"].str.replace(".3.", ".4."))]),
         r"7 rows of layers that the model has not, model\.layers\.4\."),
        (lambda t: t[t["layer"] < 3], r"7 have none, model\.layers\.3\."),
        (lambda t: t.assign(rows=t["rows"] * 2), r"model\.layers\.0\.\S+ of 64x64; it is 128x64"),
        (lambda t: pd.concat([t, t.head(1)]), "one row for each matrix"),
    ],
)  # fmt: skip
def test_a_table_of_another_model_is_refused(
    outline: Path, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], words: str
) -> None:
    manifest = ModelOutline.read(outline)
    table = scan(LocalTensors(Path(manifest.source_path)))
    table.to_parquet(tmp_path / "own.parquet")
    assert len(read_given(tmp_path / "own.parquet", manifest.modules)) == len(table)
    change(table).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match=rf"^snr\.table: .*{words}"):
        read_given(tmp_path / "other.parquet", manifest.modules)


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "snr.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="SNR table"):
        read_table(tmp_path)


def test_a_table_measured_elsewhere_takes_the_scans_place(outline: Path, tmp_path: Path) -> None:
    analyze(Inputs(outline), SnrSettings(), tmp_path / "own")
    own = read_table(tmp_path / "own")
    for name in ("snr.parquet", "spectrum.json"):
        analyze(Inputs(outline), SnrSettings(table=str(tmp_path / "own" / name)), tmp_path / name)
        given = read_table(tmp_path / name)
        assert dict(zip(given["module"], given["snr"], strict=True)) == pytest.approx(
            dict(zip(own["module"], own["snr"], strict=True))
        )
        assert top_modules(given, 50) == top_modules(own, 50)
    (tmp_path / "short.json").write_text(spectrum_json(own.iloc[1:]))
    with pytest.raises(InputError, match=rf"1 have none, {own.module[0]} is one"):
        analyze(Inputs(outline), SnrSettings(table=str(tmp_path / "short.json")), tmp_path / "short")


@needs_published
def test_selection_from_a_published_table_equals_the_published_yaml_in_its_order() -> None:
    stem = "snr_results_meta-llama-Meta-Llama-3.1-8B-Instruct"
    table = read_spectrum_json(PUBLISHED / f"{stem}.json")
    published = (PUBLISHED / f"{stem}_unfrozenparameters_50percent.yaml").read_text()
    # Norms are vectors, which Spectrum lists and this table leaves out.
    wanted = [x[2:] for x in published.splitlines() if x.startswith("- model.layers") and "norm" not in x]
    own = [line[2:] for line in unfrozen_yaml(table, 50).splitlines() if line.startswith("- model.layers")]
    assert not table["snr"].duplicated().any()  # no ties: the order is fixed
    assert len(wanted) == 7 * 16
    assert own == wanted
    assert yaml.safe_load(unfrozen_yaml(table, 50))["unfrozen_parameters"][2:] == wanted


@needs_published
def test_with_norms_the_yaml_is_the_published_one_but_for_what_is_always_unfrozen() -> None:
    stem = "snr_results_meta-llama-Meta-Llama-3.1-8B-Instruct"
    table = read_spectrum_json(PUBLISHED / f"{stem}.json")
    published = (PUBLISHED / f"{stem}_unfrozenparameters_50percent.yaml").read_text().splitlines()
    # Headings of types outside numbered layers, of which nothing is listed.
    wanted = [x for x in published if not re.match("# (lm_head|model)", x)]
    layers = [f"model.layers.{n}" for n in reversed(range(32))]
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}.{kind}.weight": (4096,)
        for layer in layers
        for kind in ("post_attention_layernorm", "input_layernorm")
    }
    shapes |= {"model.norm.weight": (4096,), "model.layers.0.self_attn.q_proj.bias": (4096,)}
    shapes |= {
        "model.layers.0.input_layernorm.bias": (4096,),
        "model.layers.0.self_attn.q_proj.weight": (1, 1),
    }
    assert len(norms := norm_modules(shapes)) == 65
    assert unfrozen_yaml(table, 50, norms).splitlines() == wanted


def test_norms_of_heads_and_of_other_families_are_listed_the_first_layers_first() -> None:
    shapes = {f"transformer.h.{n}.ln_1.weight": (8,) for n in range(4)}
    shapes |= {f"model.layers.{n}.self_attn.q_norm.weight": (8,) for n in (10, 2, 1, 0)}
    table = pd.DataFrame({"module": [], "type": [], "order": [], "calibrated": []})
    lines = unfrozen_yaml(table, 50, norm_modules(shapes)).splitlines()
    assert lines[3:] == [
        "# ln_1 layers", "- transformer.h.0.ln_1", "- transformer.h.1.ln_1",
        "# self_attn.q_norm layers", "- model.layers.0.self_attn.q_norm", "- model.layers.1.self_attn.q_norm",
    ]  # fmt: skip


@needs_published
@pytest.mark.parametrize(
    ("name", "matrices", "types", "infinite"),
    [
        ("Qwen-Qwen2-MoE-57B-A14B", 5628, 201, 917),
        ("TinyLlama-TinyLlama-v1.1", 154, 7, 16),
        ("meta-llama-Meta-Llama-3-8B", 224, 7, 0),
        ("meta-llama-Meta-Llama-3.1-8B-Instruct", 224, 7, 0),
        ("microsoft-Phi-3-mini-4k-instruct", 128, 4, 0),
    ],
)
def test_published_tables_load_completely(name: str, matrices: int, types: int, infinite: int) -> None:
    path = PUBLISHED / f"snr_results_{name}.json"
    table = read_spectrum_json(path)
    assert (len(table), table["type"].nunique()) == (matrices, types)
    assert table["snr"].map(math.isinf).sum() == infinite
    document = json.loads(path.read_text())
    flat = {
        module: value["snr"] if "snr" in value else value[module]
        for key, value in document.items()
        for module in ([key] if "snr" in value else value)
    }
    assert all(flat[row.module] == row.snr for row in table.itertuples())
    for percent in (25, 50):
        chosen = top_modules(table, percent)
        assert len(chosen) == sum(
            math.floor(len(group) * percent / 100) for _, group in table.groupby("type")
        )


def test_both_layouts_keep_infinity_and_nan_and_leave_vectors_out(tmp_path: Path) -> None:
    snr = {"model.layers.0.q": 1.5, "model.layers.1.q": math.inf, "model.layers.2.q": math.nan}
    vectors = {"model.layers.0.input_layernorm": math.inf, "model.norm": math.inf, "lm_head": 2.0}
    flat = {name: {"snr": value, "type": "q"} for name, value in (snr | vectors).items()}
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    (tmp_path / "nested.json").write_text(json.dumps({"q": snr, "other": vectors}))
    for layout in ("flat", "nested"):
        table = read_spectrum_json(tmp_path / f"{layout}.json")
        assert list(table["module"]) == list(snr)
        assert list(table["snr"]) == pytest.approx(list(snr.values()), nan_ok=True)
        assert top_modules(table, 100) == {"model.layers.0.q", "model.layers.1.q"}


def test_foreign_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="Spectrum's JSON"):
        read_spectrum_json(path)
