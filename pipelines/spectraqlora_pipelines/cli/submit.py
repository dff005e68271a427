"""The command submit."""

from __future__ import annotations

from typing import Annotated

import typer
from spectraqlora.settings import digest

from spectraqlora_pipelines.cli.kubeflow import (
    CaFile,
    Experiment,
    Host,
    Namespace,
    Package,
    Pipeline,
    PipelineName,
    PipelineRoot,
    ServiceAccount,
    TokenFile,
    Values,
    connect,
    launch,
    launched_settings,
    placed_values,
    upload,
)
from spectraqlora_pipelines.cli.options import ConfigOrVariable, PresetOrVariable, Set
from spectraqlora_pipelines.cli.screen import line


def submit(
    preset: PresetOrVariable = "default",
    config: ConfigOrVariable = None,
    set_: Set = None,
    values: Values = None,
    pipeline: Pipeline = "ablation",
    package: Package = None,
    name: Annotated[
        str,
        typer.Option(
            envvar="SPECTRAQLORA_RUN_NAME", show_envvar=False, metavar="NAME", help="Name of the run."
        ),
    ] = "",
    upload_only: Annotated[
        bool,
        typer.Option(
            "--upload-only",
            envvar="SPECTRAQLORA_UPLOAD_ONLY",
            show_envvar=False,
            help="Upload the version and start nothing.",
        ),
    ] = False,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
    pipeline_name: PipelineName = "",
    experiment: Experiment = "",
    service_account: ServiceAccount = "",
    pipeline_root: PipelineRoot = "",
) -> None:
    """Upload the pipeline to Kubeflow Pipelines and start a run.

    A version is named by program version and content, so the same pipeline is
    uploaded once. The run's arguments come from the settings.

    Example: spectraqlora submit --host http://localhost:8080 --config my.yaml
    """
    settings, arguments = launched_settings(pipeline, config, set_, preset)
    placed = placed_values(values, package)
    server = connect(host, namespace, token_file, ca_file)
    uploaded = upload(server, settings, pipeline, pipeline_name, package, placed)
    if upload_only:
        return
    run_name = name or f"{pipeline} {digest(settings)[:8]}"
    how = launch(settings, placed, experiment, service_account, pipeline_root)
    run = server.submit(uploaded, run_name, arguments, how)
    line(f"Run {run_name}: {server.run_address(run)}")
