"""Spectrum's own files: its SNR table as JSON and the unfrozen-parameters YAML that trainers read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from spectraqlora.errors import InputError
from spectraqlora.models.modules import module_identity

if TYPE_CHECKING:
    import pandas as pd


def spectrum_json(table: pd.DataFrame) -> str:
    """{module: {snr, type}}, with Infinity and NaN written as Spectrum writes them."""
    return json.dumps(
        {row.module: {"snr": float(row.snr), "type": row.type} for row in table.itertuples()}, indent=4
    )


def read_spectrum_json(path: Path) -> pd.DataFrame:
    """A published table, flat {module: {snr, type}} or nested {type: {module: snr}}, in the order of the file.

    Norm vectors and modules outside numbered layers are left out. Columns that Spectrum does not store
    are NaN.
    """
    import pandas as pd

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        pairs: list[tuple[str, float]] = []
        for key, value in document.items():
            if "snr" in value:
                pairs.append((key, float(value["snr"])))
            else:
                pairs.extend((module, float(snr)) for module, snr in value.items())
    except (OSError, ValueError, AttributeError, TypeError):
        raise InputError(
            "SNR table", path, "Spectrum's JSON: {module: {snr, type}} or {type: {module: snr}}"
        ) from None
    rows = []
    for module, snr in pairs:
        identity = module_identity(module)
        if identity is None or "norm" in identity[1]:
            continue
        rows.append({"module": module, "layer": identity[0], "type": identity[1], "snr": snr})
    table = pd.DataFrame(rows, columns=["module", "layer", "type", "snr"])
    for column in ("rows", "cols", "s1", "threshold", "signal", "noise", "calibrated", "above", "percentile"):
        table[column] = math.nan
    table["source"] = "published"
    # Infinite values keep the order of the file: what they could be ordered by is not stored.
    table["order"] = table["snr"]
    return table


def unfrozen_yaml(table: pd.DataFrame, percent: float) -> str:
    """The unfrozen-parameters file: embeddings and head, then per type the selected modules, best first."""
    from spectraqlora.snr.table import best_first, top_modules

    chosen = top_modules(table, percent)
    lines = ["unfrozen_parameters:", "- ^lm_head.weight$", "- ^model.embed_tokens.weight$"]
    for kind, group in table.groupby("type"):
        lines.append(f"# {kind} layers")
        lines += [f"- {module}" for module in best_first(group)["module"] if module in chosen]
    return "\n".join(lines) + "\n"
