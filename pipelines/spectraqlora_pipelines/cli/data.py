"""The command data: what becomes of a file's rows, before anything is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from spectraqlora.files import check_output, write_text
from spectraqlora.places import base_place, data_places

from spectraqlora_pipelines.cli.options import Config, Set, given_data, load_settings
from spectraqlora_pipelines.cli.screen import console, line


def data(
    source: Annotated[
        list[str], typer.Argument(metavar="DATA", help="Hub id, file, folder or s3:// address; several, too.")
    ],
    base_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Hub id, folder or s3:// address; its weights are not read."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the same as a page.")] = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Show what a model would learn of the data.

    Layout, splits, what is dropped and why, lengths against data.max_length,
    columns that are not used, and the first rows as the model's template
    renders them, with the learned part in colour. Nothing is trained.

    Example: spectraqlora data my.jsonl --base-model Qwen/Qwen3-0.6B --html data.html
    """
    settings = load_settings(config, {"model.base_model": base_model, **given_data(source)}, set_)
    if html:
        check_output(html, "--html")
    from spectraqlora.data.checks import check_sources
    from spectraqlora.data.for_model import description_of, row_model
    from spectraqlora.report.page import render_data_page
    from spectraqlora.runtime.console import quiet
    from spectraqlora.sample.make import on_this_machine
    from spectraqlora.steps.prepare_data.prepare import prepare_for

    from spectraqlora_pipelines.cli.data_block import show_rows

    model = settings.model
    base = on_this_machine(base_place(model.base_model, model.revision, model.trust_remote_code))
    places = [on_this_machine(place) for place in data_places(settings.data, "DATA")]
    section = settings.data.at([place.text for place in places])
    with (
        tempfile.TemporaryDirectory() as scratch,
        console.status("reading and rendering all rows"),
        quiet(),
    ):
        folder = description_of(base, Path(scratch) / "model")
        renders = row_model(folder, section, model.trust_remote_code)
        refused = check_sources(places, section, renders)
        rows = prepare_for(renders, section, settings.seed, Path(scratch) / "rows")
    for text in refused:
        line(f"Data: {text}", style="yellow")
    show_rows(rows, console)
    if html:
        write_text(html, render_data_page(rows, base.text))
        line(f"Page: {html}")
