"""The command snr."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from spectraqlora.errors import InputError
from spectraqlora.files import check_output, complete, write_text
from spectraqlora.places import base_place

from spectraqlora_pipelines.cli.screen import bars, console

if TYPE_CHECKING:
    import pandas as pd
    from spectraqlora.models.tensors import Tensors

_LAYERS = re.compile(r"(?=\b\d+\.)")


def snr(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder, hub id, or s3:// address."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the table as Parquet.",
        ),
    ] = None,
    spectrum_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write Spectrum's own JSON.")
    ] = None,
    percent: Annotated[float, typer.Option(metavar="N", help="Share of each module type to select.")] = 50.0,
    unfrozen_yaml: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write Axolotl's and Spectrum's file."),
    ] = None,
    norms: Annotated[
        bool, typer.Option("--norms", help="List norms in that file, too, as Spectrum does.")
    ] = False,
) -> None:
    """Show the signal-to-noise ratio of every weight matrix.

    A checkpoint is a folder of safetensors, in 4 bits or not. At an s3://
    address it is read where it is, a matrix at a time, without a copy on disk.
    With --output, an interrupted scan resumes where it stopped.

    Example: spectraqlora snr s3://models/llama --output snr.parquet
    """
    if not 0 < percent <= 100:
        raise InputError("--percent", percent, "a number above 0 and at most 100")
    if norms and unfrozen_yaml is None:
        raise InputError("--norms", "", "--unfrozen-yaml FILE beside it, which it is about")
    outputs = {"--output": output, "--spectrum-json": spectrum_json, "--unfrozen-yaml": unfrozen_yaml}
    for option, path in outputs.items():
        if path:
            check_output(path, option)
    from spectraqlora.snr.journal import ScanJournal
    from spectraqlora.snr.spectrum_format import norm_modules
    from spectraqlora.snr.spectrum_format import spectrum_json as to_json
    from spectraqlora.snr.spectrum_format import unfrozen_yaml as to_yaml
    from spectraqlora.snr.table import top_modules

    checkpoint = _open_checkpoint(model)
    journal = None
    if output:
        journal = ScanJournal(output.with_name(output.name + ".partial.jsonl"), checkpoint.digest)
    table = _scan(checkpoint, journal)
    console.print(snr_table(table, top_modules(table, percent), percent, console))
    if output:
        with complete(output) as partial:
            table.to_parquet(partial)
    if journal:
        journal.remove()
    if spectrum_json:
        write_text(spectrum_json, to_json(table))
    if unfrozen_yaml:
        vectors = norm_modules({name: checkpoint.shape(name) for name in checkpoint.names()}) if norms else []
        write_text(unfrozen_yaml, to_yaml(table, percent, vectors))


def _open_checkpoint(model: str) -> Tensors:
    from spectraqlora.models.inspection import open_tensors
    from spectraqlora.sample.make import on_this_machine

    return open_tensors(on_this_machine(base_place(model, field="MODEL")))


def _scan(checkpoint: Tensors, journal: Any) -> pd.DataFrame:
    from spectraqlora.snr.scan import scan

    # Matrices of a large model take minutes each: the estimate of the time left looks back far enough.
    with bars(console, bar_width=20, speed_estimate_period=1800) as shown:
        bar: Any = None

        def on_matrix(done: int, total: int, module: str) -> None:
            nonlocal bar
            if bar is None:
                bar = shown.add_task("measuring", total=total, completed=done)
            else:
                shown.update(bar, completed=done, description=module[_common_prefix([module]) :])

        return scan(checkpoint, None, on_matrix, journal)


def snr_table(table: pd.DataFrame, chosen: set[str], percent: float, screen: Console) -> Table:
    """The table as wide as the screen allows: first the modules' common prefix goes, then columns."""
    prefix = _common_prefix(list(table["module"]))
    title = f"SNR of {len(table)} matrices; * is in the top {percent:g} % of its type"
    columns: dict[str, Callable[[Any], str]] = {
        "": lambda row: "*" if row.module in chosen else "",
        "module": lambda row: row.module,
        "shape": lambda row: f"{row.rows}x{row.cols}",
        "s1": lambda row: f"{row.s1:.3f}",
        "threshold": lambda row: f"{row.threshold:.3f}",
        "snr": lambda row: f"{row.snr:.4f}",
        "calibrated": lambda row: f"{row.calibrated:.3f}",
        "percentile": lambda row: f"{row.percentile:.0f}",
    }

    def layout() -> Table:
        shown = Table(title=title)
        for name in columns:
            shown.add_column(name, justify="left" if name in ("", "module") else "right", overflow="fold")
        for row in table.itertuples():
            shown.add_row(*(cell(row) for cell in columns.values()))
        return shown

    def fits(shown: Table) -> bool:
        return Measurement.get(screen, screen.options.update_width(1000), shown).maximum <= screen.width

    if fits(shown := layout()):
        return shown
    columns["module"] = lambda row: row.module[prefix:]
    title += f"\nmodules inside {table['module'].iloc[0][:prefix].rstrip('.')}" if prefix else ""
    for dropped in ("threshold", "s1", "percentile", "shape"):
        if fits(shown := layout()):
            break
        del columns[dropped]
    return layout()


def _common_prefix(modules: list[str]) -> int:
    """Characters before the layer index, where all modules share them, else 0."""
    heads = {_LAYERS.split(module, maxsplit=1)[0] for module in modules}
    return len(heads.pop()) if len(heads) == 1 else 0
