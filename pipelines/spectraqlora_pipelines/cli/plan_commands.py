"""The command plan: memory per step and method, what fits, what to change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import names

from spectraqlora_pipelines.cli.config import load_settings

if TYPE_CHECKING:
    from spectraqlora.planning.memory_plan import Need, Plan

_UNITS = {"GB": 10**9, "GIB": 2**30, "G": 10**9, "GI": 2**30}
_GIB = 2**30
console = Console()


def size(text: str, option: str) -> int:
    """Bytes of a size such as 24GB or 80GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G|Gi)", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise InputError(option, text, "a size such as 24GB or 80GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def plan(
    base_model: Annotated[
        str | None, typer.Option(help="7B, 13B, 65B or 70B (Llama's shapes), a folder, or a hub id.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Memory of the GPU, such as 24GB. Default: no GPU.")] = "",
    methods: Annotated[str | None, typer.Option(help=f"Branches: {', '.join(names())}.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table for documents.")] = False,
) -> None:
    """Show how much memory every step takes, what fits, and what to change where it does not.

    Only the model's config is read, no weights. Figures are upper bounds, for rows of data.max_length tokens.

    Example: spectraqlora plan --base-model 13B --gpu 24GB --set train.batch_size=4
    """
    overrides = {"model.base_model": base_model, "methods": methods}
    settings = load_settings(config, overrides, set_ or [])
    device = size(gpu, "--gpu") if gpu else 0
    import warnings

    from spectraqlora.planning import memory_plan

    warnings.simplefilter("ignore")

    source = settings.model.base_model
    if source == "sample":
        from spectraqlora.sample.make import ensure_sample

        source = str(ensure_sample() / "model")
    found, free = memory_plan.plan_for(source, settings, device)
    outline = found.outline
    where = f"a GPU of {gpu}" if gpu else "this machine"
    rows = [row(found, need, free) for need in found.needs]
    title = (
        f"{settings.model.base_model}: {outline.parameters / 1e9:.2f}B parameters, "
        f"{outline.weight_bytes / _GIB:.1f} GiB in 4 bits; {where} has {free / _GIB:.1f} GiB for a step"
    )
    header = ("step", "GPU GiB" if gpu else "GiB", *(["host GiB"] if gpu else []), "fits", "most of it")
    if markdown:
        print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
        for cells in rows:
            print(f"| {' | '.join(_without_host(cells, gpu))} |")
        return
    table = Table(title=title)
    for name in header:
        table.add_column(name, justify="right" if "GiB" in name else "left")
    for cells in rows:
        table.add_row(*_without_host(cells, gpu))
    console.print(table)
    for need in found.needs:
        if need.device > free:
            change, then = found.changes(need, free)
            line = f"{need.label} takes {then / _GIB:.1f} GiB with {change}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def row(found: Plan, need: Need, free: int) -> tuple[str, ...]:
    """A step's cells: name, device, host, fits, what takes most."""
    host = f"{need.host / _GIB:.1f}" if found.cuda else ""
    return need.label, f"{need.device / _GIB:.1f}", host, "yes" if need.device <= free else "no", need.largest


def _without_host(cells: tuple[str, ...], gpu: Any) -> tuple[str, ...]:
    return cells if gpu else (*cells[:2], *cells[3:])
