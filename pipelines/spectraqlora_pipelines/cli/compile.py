"""The command compile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from spectraqlora.errors import InputError
from spectraqlora.files import check_output, write_text

from spectraqlora_pipelines.cli.argo import ARGO, read_for_argo
from spectraqlora_pipelines.cli.options import Config, Methods, Preset, Set, load_settings
from spectraqlora_pipelines.cli.screen import errors, line

COMPILED = Path(__file__).resolve().parents[2]
"""Folder of the pipelines that are checked in."""


def compile_(
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write; else PIPELINE.yaml.",
        ),
    ] = None,
    pipeline: Annotated[str, typer.Option(metavar="NAME", help="ablation or retraining.")] = "ablation",
    methods: Methods = None,
    rounds: Annotated[int | None, typer.Option(metavar="N", help="Rounds, unrolled.")] = None,
    preset: Preset = "default",
    config: Config = None,
    set_: Set = None,
    target: Annotated[str, typer.Option(metavar="NAME", help="local, kubernetes or argo.")] = "local",
    values: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file: how each step runs there."),
    ] = None,
) -> None:
    """Write the pipeline YAML for Kubeflow Pipelines or Argo.

    For a cluster, a values file gives every step its image, resources, nodes,
    retries, secrets by name and time limit: pipelines/cluster-values.yaml is
    one to copy, and `spectraqlora settings --cluster` lists all keys.

    Example: spectraqlora compile --target kubernetes --values my-values.yaml
    """
    from spectraqlora_pipelines.cluster.values import read_values
    from spectraqlora_pipelines.dags.argo import manifest, template_for
    from spectraqlora_pipelines.dags.catalogue import checked, compile_dag

    kind = checked(pipeline)
    if target not in ("local", "kubernetes", ARGO):
        raise InputError("--target", target, "local, kubernetes or argo")
    if (target != "local") != (values is not None):
        expected = "a values file" if values is None else "nothing without --target kubernetes or argo"
        raise InputError("--values", values, expected)
    settings = load_settings(config, {"methods": methods, "rounds": rounds}, set_, preset)
    output = output or (Path() if values else COMPILED) / f"{kind}.yaml"
    check_output(output, "--output")
    if target == ARGO:
        write_text(output, manifest([template_for(kind, settings, read_for_argo(values))]))
        line(f"Wrote {output}")
        return
    placed = read_values(values) if values else None
    for text in placed.short_windows() if placed else []:
        errors.print(f"warning: {text}", highlight=False)
    try:
        compile_dag(output, kind, settings, placed)
    except ValueError as error:
        raise InputError("--output", output, str(error).splitlines()[0]) from None
    line(f"Wrote {output}")
