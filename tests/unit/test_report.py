"""The report: everything a reader looks for, self-contained, and safe against odd names."""

from pathlib import Path

import pandas as pd
from spectraqlora.artifacts import Similarity
from spectraqlora.report.page import write_report
from spectraqlora.snr.table import COLUMNS

from tests.unit.results import evaluation


def _table() -> pd.DataFrame:
    rows = [dict.fromkeys(COLUMNS, 1.0) for _ in range(2)]
    for layer, row in enumerate(rows):
        row.update(
            module=f"model.layers.{layer}.mlp.up_proj", layer=layer, type="mlp.up_proj", source="original"
        )
    rows[1]["snr"] = float("inf")
    return pd.DataFrame(rows)


def test_the_page_shows_every_part_and_escapes_what_users_named(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    similarity = Similarity(modules=names, cosines=[[1.0, 0.8], [0.8, 1.0]], groups=[names])
    branches = [
        evaluation("sgm", [1.0, 2.0], 10, similarity=similarity),
        evaluation("qlora", [2.0, 3.0], 20, accuracy=None),
    ]
    page = tmp_path / "report.html"
    settings = {"model": {"base_model": "<script>alert(1)</script>"}, "seed": 1}
    write_report(page, branches, _table(), settings, {"data": "d" * 64}, "sgm")
    text = page.read_text()
    for words in (
        "Leaderboard",
        "Signal-to-noise",
        "Where each method trained",
        "whose gradients agree",
        "Cost",
    ):
        assert words in text
    assert "2 candidates in 1 groups; 2 modules share an update" in text
    assert "∞" in text and "d" * 64 in text
    assert "<script" not in text and "&lt;script&gt;" in text
    assert text.count("<svg") == 5
