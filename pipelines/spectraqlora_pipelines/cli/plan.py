"""The command plan: memory per step and method, what fits, what to change."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table
from spectraqlora.errors import InputError
from spectraqlora.places import Place, base_place

from spectraqlora_pipelines.cli.options import Config, Markdown, Methods, Preset, Set, load_settings
from spectraqlora_pipelines.cli.screen import console, line

if TYPE_CHECKING:
    from spectraqlora.planning.steps import Plan
    from spectraqlora.settings import Settings

_GIB = 2**30


def size(text: str, option: str) -> int:
    """Bytes of a size such as 24GB (24·10⁹) or 80GiB (80·2³⁰, also written 80Gi).

    Raises:
        InputError: it is no size, is zero, or has no unit.
    """
    try:
        # ByteSize reads as far as it understands, and knows no Gi.
        if not re.fullmatch(r"\d+(\.\d+)?\s*[a-z]+", text.strip(), re.IGNORECASE):
            raise ValueError(text)
        full = text + "B" if text.lower().endswith("i") else text
        size = TypeAdapter(ByteSize).validate_python(full)
    except (ValidationError, ValueError):
        size = ByteSize(0)
    if size <= 0:
        raise InputError(option, text, "a size such as 24GB or 80GiB")
    return int(size)


def plan(
    base_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="7B, 13B, 65B, 70B, a folder, or a hub id."),
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="SIZE", help="Memory of the GPU, such as 24GB or 80GiB.")] = "",
    methods: Methods = None,
    preset: Preset = "default",
    config: Config = None,
    set_: Set = None,
    markdown: Markdown = False,
) -> None:
    """Show memory and disk of every step, what fits, what to change.

    Only the model's config is read, no weights; 7B to 70B are Llama's shapes.
    Figures are upper bounds, for rows of data.max_length tokens. Without --gpu
    they are for this machine's main memory.

    Example: spectraqlora plan --base-model 13B --gpu 24GB --methods hybrid
    """
    settings = load_settings(config, {"model.base_model": base_model, "methods": methods}, set_, preset)
    device = size(gpu, "--gpu") if gpu else 0
    from spectraqlora.planning.advice import changes
    from spectraqlora.sample.make import on_this_machine

    warnings.simplefilter("ignore")
    model = settings.model
    base = on_this_machine(base_place(model.base_model, model.revision, model.trust_remote_code))
    planned, free = planned_for(base, settings, device)
    header, rows = _cells(planned, free)
    if markdown:
        print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
        for cells in rows:
            print(f"| {' | '.join(cells)} |")
        return
    shape = planned.shape
    table = Table(
        title=f"{settings.model.base_model}: {shape.parameters / 1e9:.2f}B parameters, "
        f"{shape.weight_bytes / _GIB:.1f} GiB in 4 bits; "
        f"{f'a GPU of {gpu}' if gpu else 'this machine'} has {free / _GIB:.1f} GiB for a step"
    )
    for name in header:
        table.add_column(name, justify="right" if "GiB" in name else "left")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    console.print(_disk_table(planned))
    for memory in planned.steps:
        if memory.device > free:
            change, then = changes(planned, memory, free)
            line(f"{memory.label} takes {then / _GIB:.1f} GiB with {change}")


def planned_for(base: Place, settings: Settings, gpu_bytes: int) -> tuple[Plan, int]:
    """The plan of a run with a base model, and the bytes that a step has; a folder with weights is looked at before.

    Raises:
        InputError: it is no base for training, or its memory cannot be planned.
    """
    from spectraqlora.models.inspection import inspect_base
    from spectraqlora.planning.steps import plan_for

    if base.kind == "path" and any(base.path.glob("*.safetensors*")):
        inspect_base(base)
    try:
        return plan_for(base.text, settings, gpu_bytes)
    except InputError:
        raise
    except Exception as error:  # of the model's own code, which runs on tensors without content
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            "model.base_model",
            base,
            f"a model whose memory can be planned ({type(error).__name__}: {reason})",
        ) from None


def _disk_table(planned: Plan) -> Table:
    """What the steps of a run write."""
    from spectraqlora.planning.disk import base_bytes, disk, most
    from spectraqlora.runtime.disk import shown

    steps = disk(planned.shape, planned.settings)
    table = Table(
        title=f"Disk: up to {shown(most(steps))}, without the data's rows; a base from the hub or a store is "
        f"kept in the cache, {shown(base_bytes(planned.shape))}"
    )
    for name in ("step", "kept", "while it runs"):
        table.add_column(name, justify="left" if name == "step" else "right")
    table.add_column("most of it")
    for step in steps:
        if step.kept or step.passing:
            table.add_row(
                step.step, *(shown(size) if size else "-" for size in (step.kept, step.passing)), step.what
            )
    return table


def _cells(planned: Plan, free: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; host memory is of interest where there is a GPU."""
    columns = {
        "step": lambda memory: memory.label,
        "GPU GiB" if planned.cuda else "GiB": lambda memory: f"{memory.device / _GIB:.1f}",
        "host GiB": lambda memory: f"{memory.host / _GIB:.1f}",
        "fits": lambda memory: "yes" if memory.device <= free else "no",
        "most of it": lambda memory: memory.largest,
    }
    if not planned.cuda:
        del columns["host GiB"]
    return list(columns), [[cell(memory) for cell in columns.values()] for memory in planned.steps]
