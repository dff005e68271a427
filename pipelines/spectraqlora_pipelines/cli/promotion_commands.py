"""The commands promote and models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from spectraqlora.errors import InputError
from spectraqlora.settings import HIGHER_IS_BETTER, LOWER_IS_BETTER, Settings

from spectraqlora_pipelines.cli.config import load_settings

if TYPE_CHECKING:
    from spectraqlora.steps.promote.promotion import Outcome
    from spectraqlora.tracking.registry import Version

promote = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=False,
    help="Let the gate decide about a version, force one, or roll back.",
)

Uri = Annotated[
    str,
    typer.Option(
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow server, or the workdir of a local run; user and password: MLFLOW_TRACKING_USERNAME, "
        "MLFLOW_TRACKING_PASSWORD.",
    ),
]
Name = Annotated[str, typer.Option(help="Registered model; that of tracking.registered_model.")]
Config = Annotated[Path | None, typer.Option(envvar="SPECTRAQLORA_CONFIG", help="YAML file of settings.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]

console = Console()


@promote.callback()
def promote_(
    context: typer.Context,
    version: Annotated[
        int | None, typer.Option(help="Version to promote; the one with alias challenger.")
    ] = None,
    uri: Uri = "",
    name: Name = "",
    config: Config = None,
    set_: Set = None,
    dry_run: DryRun = False,
    force: Annotated[
        str, typer.Option(metavar="REASON", help="Promote whatever the gate says; the reason is recorded.")
    ] = "",
) -> None:
    """Let the gate decide whether a version becomes champion.

    It does when, on the same eval rows, promote.metric is better by more than promote.margin and no guard got
    worse than its bound. Where champion and challenger were scored on other rows, both are scored again.

    Example: spectraqlora promote --uri http://mlflow:5000 --dry-run

    Example: spectraqlora promote --uri runs/demo --version 3 --force "reviewed by hand"

    Exit code 0: promoted, or champion already; 3: not promoted; 2: bad input.
    """
    if context.invoked_subcommand is not None:
        return
    from spectraqlora.steps.promote.promotion import Promotion
    from spectraqlora.tracking.registry import CHALLENGER, Registry

    settings = _settings(uri, name, config, set_)
    registry = Registry(settings.tracking)
    challenger = registry.version(version if version is not None else CHALLENGER)
    outcome = Promotion(registry, challenger, settings.promote, settings.evaluate).run(dry_run, force)
    _show(outcome, dry_run)
    if not outcome.promoted and outcome.decision != "is champion":
        raise typer.Exit(3)


@promote.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; it is recorded.")] = "rolled back by hand",
    uri: Uri = "",
    name: Name = "",
    config: Config = None,
    set_: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Make the champion before the present one champion again.

    Example: spectraqlora promote rollback --uri http://mlflow:5000 --reason "answers got slower"
    """
    from spectraqlora.steps.promote.promotion import rollback as roll_back
    from spectraqlora.tracking.registry import Registry

    settings = _settings(uri, name, config, set_)
    _show(roll_back(Registry(settings.tracking), reason, dry_run), dry_run)


def models(uri: Uri = "", name: Name = "", config: Config = None, set_: Set = None) -> None:
    """List a registered model's versions with their aliases and numbers.

    Example: spectraqlora models --uri runs/demo
    """
    from spectraqlora.tracking.registry import Registry

    settings = _settings(uri, name, config, set_)
    found = Registry(settings.tracking).versions()
    if not found:
        raise InputError("--name", settings.tracking.registered_model, "a registered model with versions")
    console.print(_table(settings, found))


def _settings(uri: str, name: str, config: Path | None, set_: list[str] | None) -> Settings:
    database = Path(uri, "mlflow.db")
    if uri and "://" not in uri:
        if not database.is_file():
            raise InputError("--uri", uri, "the address of an MLflow server, or the workdir of a local run")
        uri = f"sqlite:///{database.absolute()}"
    given = {"tracking.uri": uri or None, "tracking.registered_model": name or None}
    settings = load_settings(config, given, set_ or [])
    if not settings.tracking.uri:
        raise InputError("--uri", "", "the address of an MLflow server, or the workdir of a local run")
    return settings


def _show(outcome: Outcome, dry_run: bool) -> None:
    what = f"would be {outcome.decision}" if dry_run else outcome.decision
    if outcome.decision == "is champion":
        what = outcome.decision
    console.print(
        f"Version {outcome.version} {what}: {outcome.reason}", soft_wrap=True, highlight=False, markup=False
    )
    if outcome.challenger:
        table = Table("metric", f"version {outcome.version}", f"champion {outcome.against or ''}".strip())
        for metric, value in outcome.challenger.items():
            before = outcome.champion.get(metric)
            table.add_row(metric, f"{value:.6g}", "" if before is None else f"{before:.6g}")
        console.print(table)
        console.print(f"Scored {outcome.scored}.", highlight=False)


def _table(settings: Settings, versions: list[Version]) -> Table:
    wanted = [settings.promote.metric, *settings.promote.bounds, "accuracy", "trainable_parameters"]
    known = HIGHER_IS_BETTER | LOWER_IS_BETTER | set(wanted)
    columns = [
        metric
        for metric in dict.fromkeys(wanted)
        if metric in known and any(metric in version.metrics for version in versions)
    ]
    table = Table(title=f"Versions of {settings.tracking.registered_model}", pad_edge=False)
    for column in ("version", "aliases", "method", *columns, "decision"):
        heading = column.replace("_", " ")  # a narrow terminal breaks it between words
        table.add_column(
            heading,
            justify="right" if column in columns else "left",
            overflow="fold",
            min_width=max(map(len, heading.split())),
        )

    def number(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"

    for version in versions:
        cells: list[Any] = [number(version.metrics.get(metric)) for metric in columns]
        table.add_row(
            str(version.number),
            "\n".join(f"[bold green]{a}[/]" if a == "champion" else a for a in version.aliases),
            version.tags.get("method", ""),
            *cells,
            version.tags.get("promotion.decision", ""),
        )
    return table
