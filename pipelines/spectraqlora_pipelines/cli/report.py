"""The command report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectraqlora_pipelines.cli.screen import line


def report(
    workdir: Annotated[Path, typer.Argument(metavar="WORKDIR", help="The workdir of a finished run.")],
) -> None:
    """Write a finished run's report.html again.

    Example: spectraqlora report runs/sample
    """
    from spectraqlora_pipelines.local.outputs import read_outputs
    from spectraqlora_pipelines.local.results import report as write

    line(f"Report: {write(read_outputs(workdir.absolute()))}")
