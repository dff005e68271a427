"""The commands submit and schedule."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from spectraqlora.errors import InputError
from spectraqlora.settings import Settings, digest

from spectraqlora_pipelines.cli.config import load_settings

if TYPE_CHECKING:
    from spectraqlora_pipelines.cluster.values import ClusterValues

TOKEN, COOKIE = "SPECTRAQLORA_KFP_TOKEN", "SPECTRAQLORA_KFP_COOKIE"
"""Environment variables that hold the secrets; there are no options for them, so that no shell remembers."""

schedule = typer.Typer(
    no_args_is_help=True,
    help="Recurring runs on Kubeflow Pipelines: create, list, pause, resume, delete.",
)

Host = Annotated[
    str,
    typer.Option(
        envvar=["SPECTRAQLORA_KFP_HOST", "KF_PIPELINES_ENDPOINT"], help="Address of Kubeflow Pipelines."
    ),
]
Namespace = Annotated[
    str, typer.Option(envvar="SPECTRAQLORA_KFP_NAMESPACE", help="Profile namespace of a multi-user Kubeflow.")
]
TokenFile = Annotated[
    str,
    typer.Option(
        envvar=["SPECTRAQLORA_KFP_TOKEN_FILE", "KF_PIPELINES_SA_TOKEN_PATH"],
        help=f"File with a bearer token, read again when it changes. A token itself goes into {TOKEN}, "
        f"a session cookie into {COOKIE}.",
    ),
]
CaFile = Annotated[
    str, typer.Option(envvar="SPECTRAQLORA_KFP_CA_FILE", help="Certificates that vouch for the host.")
]
Pipeline = Annotated[str, typer.Option(envvar="SPECTRAQLORA_PIPELINE", help="ablation or retraining.")]
PipelineName = Annotated[
    str, typer.Option(envvar="SPECTRAQLORA_PIPELINE_NAME", help="Name on the server; spectraqlora-PIPELINE.")
]
Package = Annotated[
    Path | None,
    typer.Option(
        envvar="SPECTRAQLORA_PIPELINE_PACKAGE",
        help="Take this compiled YAML (`spectraqlora compile`) instead of compiling now.",
    ),
]
Values = Annotated[
    Path | None,
    typer.Option(
        envvar="SPECTRAQLORA_CLUSTER_VALUES",
        help="Values file of `compile --target kubernetes`: where and how each step runs; service account, "
        "pipeline root and experiment of the run, unless given here.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(envvar="SPECTRAQLORA_CONFIG", help="YAML file of settings: the run's arguments."),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
Experiment = Annotated[
    str,
    typer.Option(envvar="SPECTRAQLORA_KFP_EXPERIMENT", help="KFP experiment; that of tracking.experiment."),
]
ServiceAccount = Annotated[
    str, typer.Option(envvar="SPECTRAQLORA_KFP_SERVICE_ACCOUNT", help="Service account of the steps.")
]
PipelineRoot = Annotated[
    str, typer.Option(envvar="SPECTRAQLORA_PIPELINE_ROOT", help="s3:// address of the steps' artifacts.")
]

console = Console()


def submit(
    host: Host = "",
    pipeline: Pipeline = "ablation",
    config: Config = None,
    set_: Set = None,
    package: Package = None,
    values: Values = None,
    name: Annotated[str, typer.Option(envvar="SPECTRAQLORA_RUN_NAME", help="Name of the run.")] = "",
    upload_only: Annotated[
        bool, typer.Option(envvar="SPECTRAQLORA_UPLOAD_ONLY", help="Upload the version and start nothing.")
    ] = False,
    pipeline_name: PipelineName = "",
    namespace: Namespace = "",
    experiment: Experiment = "",
    service_account: ServiceAccount = "",
    pipeline_root: PipelineRoot = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
) -> None:
    """Upload the pipeline to Kubeflow Pipelines and start a run.

    A version is named by program version and content, so the same pipeline is uploaded once. The run's
    arguments come from the settings file; every option can be an environment variable.

    Example: spectraqlora submit --host http://localhost:8080 --config my.yaml
    """
    settings, arguments = _checked(pipeline, config, set_)
    placed = _placed(values, package)
    server = _connect(host, namespace, token_file, ca_file)
    uploaded = _upload(server, settings, pipeline, pipeline_name, package, placed)
    if upload_only:
        return
    run_name = name or f"{pipeline} {digest(settings)[:8]}"
    run = server.submit(
        uploaded, run_name, arguments, _launch(settings, placed, experiment, service_account, pipeline_root)
    )
    console.print(f"Run {run_name}: {server.run_address(run)}", soft_wrap=True, highlight=False)


@schedule.command("create")
def create(
    name: Annotated[str, typer.Argument(envvar="SPECTRAQLORA_SCHEDULE", help="Name of the schedule.")],
    host: Host = "",
    cron: Annotated[
        str,
        typer.Option(
            envvar="SPECTRAQLORA_CRON",
            help='"0 3 * * 1" is Mondays at 3:00, in the time zone of KFP, which is UTC unless set otherwise.',
        ),
    ] = "",
    every: Annotated[str, typer.Option(envvar="SPECTRAQLORA_EVERY", help="Interval: 30m, 6h, 1d.")] = "",
    paused: Annotated[bool, typer.Option(envvar="SPECTRAQLORA_PAUSED", help="Make it, but paused.")] = False,
    pipeline: Pipeline = "retraining",
    config: Config = None,
    set_: Set = None,
    package: Package = None,
    values: Values = None,
    pipeline_name: PipelineName = "",
    namespace: Namespace = "",
    experiment: Experiment = "",
    service_account: ServiceAccount = "",
    pipeline_root: PipelineRoot = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
) -> None:
    """Create the recurring run of that name, or change it to what is given here.

    Missed times are not made up for, and runs never overlap. The same command again changes nothing.

    Example: spectraqlora schedule create nightly --cron "0 3 * * *" --config my.yaml --host http://kfp:8888
    """
    from spectraqlora_pipelines.cluster.cron import cron_line, interval_seconds

    if bool(cron) == bool(every):
        raise InputError("--cron", cron, "either --cron or --every")
    line = cron_line(cron) if cron else ""
    seconds = interval_seconds(every) if every else 0
    settings, arguments = _checked(pipeline, config, set_)
    placed = _placed(values, package)
    server = _connect(host, namespace, token_file, ca_file)
    uploaded = _upload(server, settings, pipeline, pipeline_name, package, placed)
    done = server.schedule(
        uploaded,
        name,
        arguments,
        _launch(settings, placed, experiment, service_account, pipeline_root),
        line,
        seconds,
        enabled=not paused,
    )
    when = f"cron {line}" if line else f"every {seconds} s"
    note = f" (KFP's cron begins with seconds; {cron!r} became this)" if line and line != cron.strip() else ""
    console.print(f"Schedule {name} {done}: {when}{note}", soft_wrap=True, highlight=False)


@schedule.command("list")
def list_(
    host: Host = "", namespace: Namespace = "", token_file: TokenFile = "", ca_file: CaFile = ""
) -> None:
    """List the recurring runs.

    Example: spectraqlora schedule list --host http://localhost:8080
    """
    from spectraqlora_pipelines.cluster.client import timing

    table = Table("name", "when", "state", "made")
    found = _connect(host, namespace, token_file, ca_file).schedules()
    for run in found:
        state = "paused" if run.mode == "DISABLE" else "active"
        table.add_row(run.display_name, timing(run), state, f"{run.created_at:%Y-%m-%d %H:%M}")
    console.print(table if found else "There is no schedule.")


@schedule.command("pause")
def pause(
    name: str, host: Host = "", namespace: Namespace = "", token_file: TokenFile = "", ca_file: CaFile = ""
) -> None:
    """Start no more runs until resumed.

    Example: spectraqlora schedule pause nightly --host http://localhost:8080
    """
    _connect(host, namespace, token_file, ca_file).change(name, "pause")
    console.print(f"Schedule {name} paused", highlight=False)


@schedule.command("resume")
def resume(
    name: str, host: Host = "", namespace: Namespace = "", token_file: TokenFile = "", ca_file: CaFile = ""
) -> None:
    """Go on from the next time on; times missed while it was paused are not made up for.

    Example: spectraqlora schedule resume nightly --host http://localhost:8080
    """
    _connect(host, namespace, token_file, ca_file).change(name, "resume")
    console.print(f"Schedule {name} active", highlight=False)


@schedule.command("delete")
def delete(
    name: str, host: Host = "", namespace: Namespace = "", token_file: TokenFile = "", ca_file: CaFile = ""
) -> None:
    """Delete a schedule; runs under way go on. Deleting what is not there is fine.

    Example: spectraqlora schedule delete nightly --host http://localhost:8080
    """
    count = _connect(host, namespace, token_file, ca_file).change(name, "delete")
    console.print(f"Schedule {name} {'deleted' if count else 'was not there'}", highlight=False)


def _checked(pipeline: str, config: Path | None, set_: list[str] | None) -> tuple[Settings, dict[str, Any]]:
    """Settings that a cluster can run, and the pipeline's arguments from them."""
    from spectraqlora_pipelines.dags.catalogue import cluster_arguments

    settings = load_settings(config, {}, set_ or [])
    return settings, cluster_arguments(pipeline, settings)


def _connect(host: str, namespace: str, token_file: str, ca_file: str) -> Any:
    from spectraqlora_pipelines.cluster.client import Connection, Kubeflow

    return Kubeflow(
        Connection(
            host,
            namespace,
            os.environ.get(TOKEN, "").strip(),
            token_file,
            os.environ.get(COOKIE, "").strip(),
            ca_file,
        )
    )


def _placed(values: Path | None, package: Path | None) -> ClusterValues | None:
    if values is None:
        return None
    from spectraqlora_pipelines.cluster.values import read_values

    if package is not None:
        raise InputError(
            "--values", values, "nothing beside --package, which was compiled with its own values"
        )
    return read_values(values)


def _launch(
    settings: Settings,
    placed: ClusterValues | None,
    experiment: str,
    service_account: str,
    pipeline_root: str,
) -> Any:
    from spectraqlora_pipelines.cluster.client import Launch

    run = placed.run if placed else None
    return Launch(
        experiment or (run.experiment if run else "") or settings.tracking.experiment,
        service_account or (run.service_account if run else None) or None,
        pipeline_root or (run.pipeline_root if run else "") or None,
    )


def _upload(
    server: Any,
    settings: Settings,
    pipeline: str,
    name: str,
    package: Path | None,
    placed: ClusterValues | None,
) -> Any:
    from spectraqlora_pipelines.dags.catalogue import checked, compile_dag, describe

    kind = checked(pipeline)
    if package is not None and not package.is_file():
        raise InputError("--package", package, "a pipeline YAML written by `spectraqlora compile`")
    with tempfile.TemporaryDirectory() as scratch:
        if package is None:
            package = Path(scratch) / f"{kind}.yaml"
            compile_dag(package, kind, settings, placed)
        uploaded = server.upload(package, name or f"spectraqlora-{pipeline}", describe(kind))
    state = "uploaded" if uploaded.new else "is there already"
    console.print(f"Pipeline version {uploaded.name} {state}", soft_wrap=True, highlight=False)
    return uploaded
