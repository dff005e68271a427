"""The SNR table as an artifact: Parquet, Spectrum's JSON and a heat map; and selection from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from spectraqlora.artifacts import LinearModule
from spectraqlora.errors import InputError
from spectraqlora.files import write_text
from spectraqlora.snr.spectrum_format import read_spectrum_json, spectrum_json

FILENAME, HEATMAP = "snr.parquet", "heatmap.png"
COLUMNS = [
    "module",
    "layer",
    "type",
    "rows",
    "cols",
    "s1",
    "threshold",
    "signal",
    "noise",
    "snr",
    "calibrated",
    "above",
    "order",
    "percentile",
    "source",
]


def write_table(table: pd.DataFrame, folder: Path) -> None:
    """Write `snr.parquet`, `spectrum.json` and `heatmap.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (FILENAME + ".partial")
    table.to_parquet(partial)
    partial.replace(folder / FILENAME)
    write_text(folder / "spectrum.json", spectrum_json(table))
    _heatmap(table, folder / HEATMAP)


def read_table(folder: Path) -> pd.DataFrame:
    """Read `snr.parquet`; refuses a missing, broken or foreign table."""
    return read_parquet(folder / FILENAME)


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a table that `write_table` or the `snr` command wrote."""
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError):
        raise InputError("SNR table", path, "a readable Parquet file") from None
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise InputError("SNR table", path, f"columns {', '.join(missing)}")
    return table


def read_given(path: Path, modules: Sequence[LinearModule], ties: str = "spectrum") -> pd.DataFrame:
    """A table measured elsewhere, in Parquet or Spectrum's JSON, for the modules of a model.

    Args:
        path: of the table.
        modules: of the model.
        ties: the setting `snr.ties`; Spectrum's JSON has nothing to order infinite values by, which stay as they are.

    Raises:
        InputError: unreadable, without a row for one of `modules`, or another model's: it has the same matrices of
            more layers, or of other shapes.
    """
    table = read_parquet(path) if path.suffix == ".parquet" else read_spectrum_json(path)
    rows = {row.module: row for row in table.itertuples()}
    if len(rows) != len(table):
        double = table["module"][table["module"].duplicated()].iloc[0]
        raise InputError("snr.table", path, f"one row for each matrix; {double} has several")
    missing = [m.module for m in modules if m.module not in rows]
    if missing:
        raise InputError(
            "snr.table",
            path,
            f"a row for each of {len(modules)} matrices; {len(missing)} have none, {missing[0]} is one",
        )
    kinds, own = {_without_layer(m.module) for m in modules}, {m.module for m in modules}
    if deeper := [name for name in rows if name not in own and _without_layer(name) in kinds]:
        raise InputError(
            "snr.table", path, f"a table of this model; it has {len(deeper)} rows of layers that the model has not, "
            f"{deeper[0]} is one"
        )  # fmt: skip
    for info in modules:
        sides = (rows[info.module].rows, rows[info.module].cols)
        if not any(map(math.isnan, sides)) and sorted(map(int, sides)) != sorted(
            (info.out_features, info.in_features)
        ):
            raise InputError(
                "snr.table",
                path,
                f"{info.module} of {info.out_features}x{info.in_features}; it is {int(sides[0])}x{int(sides[1])}",
            )
    table["order"] = order(table, ties)
    return table


def _without_layer(module: str) -> str:
    """A module's path without its layer: what all layers' modules of a type share."""
    return re.sub(r"\.\d+\.", ".#.", module, count=1)


def order(table: pd.DataFrame, ties: str) -> pd.Series:
    """What orders matrices within a type, the highest first; NaN where a matrix is never selected.

    The SNR; where there is no noise, with ties `spectrum` what Spectrum's program has computed since April 2025, which
    takes the noise for 1 there: signal / s1, largest for the flattest matrix. With ties `calibrated`, and where signal and
    s1 are not known, infinity stays, and the calibrated value decides.

    Args:
        table: with columns snr, signal and s1.
        ties: the setting `snr.ties`.
    """
    if ties != "spectrum":
        return table["snr"]
    by_program = (table["signal"] / table["s1"]).where(table["signal"].notna(), table["snr"])
    return table["snr"].where(table["snr"] != math.inf, by_program)


def with_rows(table: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """The table with the measured matrices' rows in the place of their old ones, percentiles anew.

    Raises:
        InputError: a measured matrix has no row in the table.
    """
    unknown = set(measured["module"]) - set(table["module"])
    if unknown:
        raise InputError("SNR table", min(unknown), "a row for every matrix with an adapter")
    fresh = measured.set_index("module")
    kept = table[~table["module"].isin(fresh.index)].set_index("module")
    merged = pd.concat([kept, fresh]).loc[table["module"]].reset_index()[list(table.columns)]
    merged["percentile"] = percentiles(merged)
    return merged


def percentiles(table: pd.DataFrame) -> pd.Series:
    """Each matrix's place by SNR among those of its type, above 0 to 100; 0 where it has no SNR."""
    return (table.groupby("type")["snr"].rank(pct=True, method="average") * 100).fillna(0.0)


def finite_snr(table: pd.DataFrame) -> dict[str, float]:
    """SNR by module, where it is a finite number."""
    return {row.module: float(row.snr) for row in table.itertuples() if math.isfinite(row.snr)}


def top_modules(table: pd.DataFrame, percent: float) -> set[str]:
    """Per type the best floor(count * percent / 100) by the column `order`; NaN never; ties by calibrated."""
    chosen: set[str] = set()
    for _, group in table.groupby("type"):
        count = math.floor(len(group) * percent / 100)
        chosen.update(best_first(group.dropna(subset=["order"]))["module"].head(count))
    return chosen


def best_first(table: pd.DataFrame) -> pd.DataFrame:
    """The rows, the highest order first."""
    return table.sort_values(["order", "calibrated"], ascending=False, kind="stable")


def _heatmap(table: pd.DataFrame, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    grid = table.pivot_table(index="type", columns="layer", values="snr", aggfunc="mean", dropna=False)
    finite = grid.where(grid.map(lambda v: math.isfinite(v) and v > 0))
    figure = Figure(figsize=(max(6, 0.4 * grid.shape[1] + 3), 0.4 * len(grid) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # A scale needs a number, and random weights may have none.
    norm = LogNorm() if finite.notna().any(axis=None) else None
    shown = axes.imshow(finite, aspect="auto", cmap="viridis", norm=norm)
    axes.set_yticks(range(len(grid)), grid.index)
    axes.set_xlabel("layer")
    axes.set_title("Signal-to-noise ratio per weight matrix")
    figure.colorbar(shown, label="SNR (log scale)")
    figure.savefig(path, dpi=120)
