"""The commands schedule create, list, pause, resume and delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from spectraqlora.errors import InputError

from spectraqlora_pipelines.cli.argo import Target, delete_of, for_argo, schedule_on_argo, wanted
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
    run_again,
    upload,
    variables,
)
from spectraqlora_pipelines.cli.options import ConfigOrVariable, Set
from spectraqlora_pipelines.cli.screen import console, line

if TYPE_CHECKING:
    from spectraqlora_pipelines.cluster.argo_client import Argo
    from spectraqlora_pipelines.cluster.client import Kubeflow

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule.")]
Owner = Annotated[
    str,
    typer.Option(
        envvar="SPECTRAQLORA_SCHEDULE_OWNER",
        show_envvar=False,
        metavar="WHO",
        help="Who keeps it, such as a Helm release.",
    ),
]


def create(
    name: Annotated[
        str,
        typer.Argument(
            envvar="SPECTRAQLORA_SCHEDULE", show_envvar=False, metavar="NAME", help="Name of the schedule."
        ),
    ],
    cron: Annotated[
        str,
        typer.Option(
            envvar="SPECTRAQLORA_CRON",
            show_envvar=False,
            metavar="LINE",
            help='"0 3 * * 1" is Mondays at 3:00.',
        ),
    ] = "",
    every: Annotated[
        str,
        typer.Option(
            envvar="SPECTRAQLORA_EVERY", show_envvar=False, metavar="TIME", help="Interval: 30m, 6h, 1d."
        ),
    ] = "",
    paused: Annotated[
        bool,
        typer.Option(
            "--paused", envvar="SPECTRAQLORA_PAUSED", show_envvar=False, help="Create it, but paused."
        ),
    ] = False,
    owner: Owner = "",
    config: ConfigOrVariable = None,
    set_: Set = None,
    values: Values = None,
    target: Target = "kubeflow",
    pipeline: Pipeline = "retraining",
    package: Package = None,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
    pipeline_name: PipelineName = "",
    experiment: Experiment = "",
    service_account: ServiceAccount = "",
    pipeline_root: PipelineRoot = "",
) -> None:
    """Create the recurring run of that name, or change it to what is given here.

    Missed times are not made up for, and its runs never overlap. The same
    command again changes nothing; a change lets a run under way finish. Times
    are in the time zone of KFP, UTC unless it was set otherwise. With an owner,
    its schedules under other names are deleted.

    Example:
    spectraqlora schedule create nightly --cron "0 3 * * *" --config my.yaml
    """
    from spectraqlora_pipelines.cluster.cron import argo_schedule, cron_line, interval_seconds

    if bool(cron) == bool(every):
        raise InputError("--cron", cron, "either --cron or --every")
    if for_argo(target):
        argo_schedule(cron, every)
        own = pipeline_name or f"spectraqlora-{name}"
        run = wanted(pipeline, config, set_, "default", values, package, own, service_account)
        schedule_on_argo(_argo(namespace), run, name, cron, every, paused, owner)
        return
    cron_fields = cron_line(cron) if cron else ""
    seconds = interval_seconds(every) if every else 0
    # What is there when a run starts counts, not what is there now.
    settings, arguments = launched_settings(pipeline, config, set_, look=False)
    placed = placed_values(values, package)
    server = connect(host, namespace, token_file, ca_file)
    again = run_again(pipeline, settings, arguments)
    uploaded = upload(server, settings, pipeline, pipeline_name, package, placed, again)
    how = launch(settings, placed, experiment, service_account, pipeline_root)
    done = server.schedule(
        uploaded, name, arguments, how, cron_fields, seconds, enabled=not paused, owner=owner
    )
    when = f"cron {cron_fields}" if cron_fields else f"every {seconds} s"
    if cron_fields and cron_fields != cron.strip():
        when += f" (KFP's cron begins with seconds; {cron!r} became this)"
    line(f"Schedule {name} {done}: {when}")
    if owner:
        _delete_of(server, owner, keep=name)


def list_(
    target: Target = "kubeflow",
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
) -> None:
    """List the recurring runs.

    Example: spectraqlora schedule list --host http://localhost:8080
    """
    from spectraqlora_pipelines.cluster.client import timing

    if for_argo(target):
        _list_on_argo(namespace)
        return
    runs = connect(host, namespace, token_file, ca_file).schedules()
    if not runs:
        line("There is no schedule.")
        return
    table = Table("name", "when", "state", "created")
    for run in runs:
        state = "paused" if run.mode == "DISABLE" else "active"
        table.add_row(run.display_name, timing(run), state, f"{run.created_at:%Y-%m-%d %H:%M}")
    console.print(table)


def _argo(namespace: str) -> Argo:
    from spectraqlora_pipelines.cluster.argo_client import Argo

    return Argo(namespace)


def _list_on_argo(namespace: str) -> None:
    found = _argo(namespace).schedules()
    if not found:
        line("There is no schedule.")
        return
    table = Table("name", "when", "state", "created", "latest run")
    for cron in found:
        spec, status = cron["spec"], cron.get("status", {})
        table.add_row(
            cron["metadata"]["name"],
            f"{', '.join(spec['schedules'])} ({spec['timezone']})",
            "paused" if spec.get("suspend") else "active",
            cron["metadata"]["creationTimestamp"][:16].replace("T", " "),
            (status.get("lastScheduledTime") or "")[:16].replace("T", " "),
        )
    console.print(table)


def pause(
    name: Name,
    target: Target = "kubeflow",
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
) -> None:
    """Start no more runs until resumed; a run under way continues.

    Example: spectraqlora schedule pause nightly --host http://localhost:8080
    """
    if for_argo(target):
        _argo(namespace).change(name, "pause")
    else:
        connect(host, namespace, token_file, ca_file).change(name, "pause")
    line(f"Schedule {name} paused")


def resume(
    name: Name,
    target: Target = "kubeflow",
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
) -> None:
    """Start runs again, from the next time on.

    Times missed while it was paused are not made up for.

    Example: spectraqlora schedule resume nightly --host http://localhost:8080
    """
    if for_argo(target):
        _argo(namespace).change(name, "resume")
    else:
        connect(host, namespace, token_file, ca_file).change(name, "resume")
    line(f"Schedule {name} active")


def delete(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the schedule.")] = "",
    owner: Owner = "",
    target: Target = "kubeflow",
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
) -> None:
    """Delete a schedule, or all that an owner keeps; runs under way continue.

    What is not there is fine.

    Example: spectraqlora schedule delete nightly --host http://localhost:8080
    """
    if bool(name) == bool(owner):
        raise InputError("NAME", name, "either the name of a schedule or --owner")
    if for_argo(target):
        argo = _argo(namespace)
        found = delete_of(argo, owner) if owner else int(argo.change(name, "delete"))
    else:
        server = connect(host, namespace, token_file, ca_file)
        found = _delete_of(server, owner) if owner else server.change(name, "delete")
    if not owner:
        line(f"Schedule {name} {'deleted' if found else 'was not there'}")
    elif not found:
        line(f"{owner} keeps no schedule")


def _delete_of(server: Kubeflow, owner: str, keep: str = "") -> int:
    """Delete an owner's schedules but the one to keep; how many names there were."""
    names = {run.display_name for run in server.schedules_of(owner)} - {keep}
    for name in sorted(names):
        server.change(name, "delete")
        line(f"Schedule {name} deleted: {owner} keeps it no more")
    return len(names)


schedule = typer.Typer(no_args_is_help=True, help="Recurring runs: create, list, pause, resume, delete.")
schedule.command("create", epilog=variables(create))(create)
schedule.command("list")(list_)
for command in (pause, resume, delete):
    schedule.command()(command)
