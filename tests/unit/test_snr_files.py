"""Scanning checkpoints, Spectrum's files, and selection from a table."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from spectraqlora.checkpoint import Checkpoint
from spectraqlora.errors import InputError
from spectraqlora.snr.scan import scan
from spectraqlora.snr.spectrum_format import read_spectrum_json, spectrum_json, unfrozen_yaml
from spectraqlora.snr.table import read_table, top_modules, write_table

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "spectrum_snr"


def test_a_scan_has_one_row_per_matrix_and_survives_parquet_and_json(
    tiny_model: Path, tmp_path: Path
) -> None:
    table = scan(Checkpoint(tiny_model))
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
            "calibrated": [9.0, 1.0, 2.0, 3.0],
        }
    )
    assert top_modules(table, 25) == {"c"}
    assert top_modules(table, 100) == {"b", "c", "d"}


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "snr.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="SNR table"):
        read_table(tmp_path)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="Spectrum's published tables are not here")
def test_selection_from_a_published_table_equals_the_published_yaml() -> None:
    stem = "snr_results_meta-llama-Meta-Llama-3.1-8B-Instruct"
    table = read_spectrum_json(PUBLISHED / f"{stem}.json")
    published = (PUBLISHED / f"{stem}_unfrozenparameters_50percent.yaml").read_text()
    wanted = {line[2:].strip() for line in published.splitlines() if line.startswith("- model.layers")}
    wanted = {name for name in wanted if "norm" not in name}
    own = {line[2:] for line in unfrozen_yaml(table, 50).splitlines() if line.startswith("- model.layers")}
    tied = table[table["snr"].map(math.isinf)].groupby("type").size()
    checked = 0
    for kind, group in table.groupby("type"):
        if tied.get(kind, 0) > len(group) // 2:
            continue
        names = set(group["module"])
        assert own & names == wanted & names, kind
        checked += 1
    assert checked >= 4


@pytest.mark.skipif(not PUBLISHED.exists(), reason="Spectrum's published tables are not here")
def test_all_published_layouts_load() -> None:
    for path in PUBLISHED.glob("*.json"):
        table = read_spectrum_json(path)
        assert len(table) > 50
        assert not table["type"].str.contains("norm").any()


def test_foreign_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="Spectrum's JSON"):
        read_spectrum_json(path)
