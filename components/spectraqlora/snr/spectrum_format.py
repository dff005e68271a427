"""Spectrum's own files: its SNR table as JSON and the unfrozen-parameters YAML that trainers read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spectraqlora.errors import InputError
from spectraqlora.models.modules import module_identity

if TYPE_CHECKING:
    import pandas as pd

_NORM = re.compile("norm|^ln")
"""In the last part of a norm's name: input_layernorm, norm1, ln_1."""


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


def unfrozen_yaml(table: pd.DataFrame, percent: float, norms: Iterable[str] = ()) -> str:
    """The unfrozen-parameters file: embeddings and head, then per type the selected modules, best first.

    Args:
        table: of the matrices.
        percent: share of each type that is selected.
        norms: modules of norm vectors (`norm_modules`). Spectrum's SNR of every vector is infinite, so it lists of each
            type the first ones.
    """
    from spectraqlora.snr.table import best_first, top_modules

    chosen = top_modules(table, percent)
    types: dict[str, list[str]] = {
        str(kind): [module for module in best_first(group)["module"] if module in chosen]
        for kind, group in table.groupby("type")
    }
    vectors: dict[str, list[tuple[int, str]]] = {}
    for module in norms:
        if identity := module_identity(module):
            vectors.setdefault(identity[1], []).append((identity[0], module))
    for kind, layers in vectors.items():
        types[kind] = [module for _, module in sorted(layers)[: math.floor(len(layers) * percent / 100)]]
    lines = ["unfrozen_parameters:", "- ^lm_head.weight$", "- ^model.embed_tokens.weight$"]
    for kind in sorted(types):
        lines.append(f"# {kind} layers")
        lines += [f"- {module}" for module in types[kind]]
    return "\n".join(lines) + "\n"


def norm_modules(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Modules of the norm vectors among a model's tensors, given by name and shape."""
    names = (name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 1)
    return [name for name in names if f"{name}.weight" in shapes and _NORM.search(name.rpartition(".")[2])]
