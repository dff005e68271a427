"""The command settings: every setting, and every key of a cluster's values file."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Column, Table
from spectraqlora.errors import InputError
from spectraqlora.settings import reference

from spectraqlora_pipelines.cli.options import Markdown
from spectraqlora_pipelines.cli.screen import console, escaped

MOST_CHANGED = (
    "data.max_length",
    "train.batch_size",
    "train.learning_rate",
    "select.percent",
    "select.rank",
)
"""The settings that `run --help` shows: for longer rows, for less memory, and the three that decide most."""


def most_changed() -> str:
    """The settings that people change most, as the end of a command's help."""
    described = {key: (default, meaning) for key, default, meaning in reference()}
    lines = []
    for key in MOST_CHANGED:
        default, meaning = described[key]
        short = re.split(r"[,;(]", meaning)[0].strip()
        lines.append(f"[cyan]{key:<20}[/cyan] {escaped(default):<8} {short}")
    head = "Most often changed with --set; [bold]spectraqlora settings[/bold] lists all settings:"
    return "\n".join([head, *lines])


def settings(
    section: Annotated[
        str,
        typer.Argument(metavar="SECTION", help="Those of one section, such as train.", show_default=False),
    ] = "",
    cluster: Annotated[bool, typer.Option("--cluster", help="The keys of a cluster's values file.")] = False,
    markdown: Markdown = False,
) -> None:
    """List every setting with its default.

    They go into the file that --config names, or after --set. Those of a
    cluster's values file go into the file that --values names.

    Example: spectraqlora settings train
    """
    if cluster:
        from spectraqlora_pipelines.cluster.values import reference as values_reference

        rows = values_reference()
    else:
        rows = reference()
    shown = [row for row in rows if not section or row[0].startswith(f"{section}.") or row[0] == section]
    if not shown:
        known = dict.fromkeys(key.partition(".")[0] for key, _, _ in rows)
        raise InputError("SECTION", section, f"one of {', '.join(known)}")
    if markdown:
        print("| setting | default | meaning |\n| --- | --- | --- |")
        for key, default, meaning in shown:
            print(f"| `{key}` | `{default}` | {meaning} |")
        return
    table = Table(Column("setting", no_wrap=True), "default", Column("meaning", ratio=1))
    for row in shown:
        table.add_row(*row)
    console.print(table)
