"""The commands promote and promote rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from spectraqlora_pipelines.cli.options import ConfigOrVariable, Set
from spectraqlora_pipelines.cli.registry import SIGN_IN, Name, Uri, registry_settings
from spectraqlora_pipelines.cli.screen import console, line

if TYPE_CHECKING:
    from spectraqlora.steps.promote.promotion import Outcome

NOT_PROMOTED = 3
"""Exit code where the champion stays."""

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]

promote = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=False,
    epilog=SIGN_IN,
)


@promote.callback()
def _promote(
    context: typer.Context,
    version: Annotated[
        int | None, typer.Option(metavar="N", help="Version to promote; else the challenger.")
    ] = None,
    uri: Uri = "",
    name: Name = "",
    config: ConfigOrVariable = None,
    set_: Set = None,
    dry_run: DryRun = False,
    force: Annotated[
        str, typer.Option(metavar="REASON", help="Promote all the same; the reason is kept.")
    ] = "",
) -> None:
    """Let the gate decide about a version, force one, or roll back.

    A version becomes champion when, on the same rows, promote.metric
    is better by more than promote.margin and no guard got worse than its bound.
    Exit code 0: promoted, or champion already; 3: not promoted; 2: bad input.

    Examples:
    spectraqlora promote --uri http://mlflow:5000 --dry-run
    spectraqlora promote --uri runs/demo --version 3 --force "reviewed by hand"
    """
    if context.invoked_subcommand is not None:
        return
    from spectraqlora.signing import REQUIRED
    from spectraqlora.steps.promote.promotion import Promotion
    from spectraqlora.tracking.registry import CHALLENGER, Registry

    settings = registry_settings(uri, name, config, set_)
    registry = Registry(settings.tracking)
    challenger = registry.version(version if version is not None else CHALLENGER)
    required = settings.export.signature == REQUIRED
    promotion = Promotion(registry, challenger, settings.promote, settings.evaluate, required)
    outcome = promotion.run(dry_run, force)
    _show(outcome, dry_run)
    if not outcome.promoted and outcome.decision != "is champion":
        raise typer.Exit(NOT_PROMOTED)


@promote.command(epilog=SIGN_IN)
def rollback(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; it is recorded.")] = "rolled back by hand",
    uri: Uri = "",
    name: Name = "",
    config: ConfigOrVariable = None,
    set_: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Make the champion before the present one champion again.

    As promote does, it refuses a version of which a byte changed since it was signed.

    Example: spectraqlora promote rollback --uri runs/demo --reason "slower answers"
    """
    from spectraqlora.signing import REQUIRED
    from spectraqlora.steps.promote.promotion import rollback as roll_back
    from spectraqlora.tracking.registry import Registry

    settings = registry_settings(uri, name, config, set_)
    required = settings.export.signature == REQUIRED
    _show(roll_back(Registry(settings.tracking), reason, dry_run, required), dry_run)


def _show(outcome: Outcome, dry_run: bool) -> None:
    conditional = dry_run and outcome.decision != "is champion"
    what = f"would be {outcome.decision}" if conditional else outcome.decision
    line(f"Version {outcome.version} {what}: {outcome.reason}")
    if outcome.challenger:
        table = Table("metric", f"version {outcome.version}", f"champion {outcome.against or ''}".strip())
        for metric, value in outcome.challenger.items():
            before = outcome.champion.get(metric)
            table.add_row(metric, f"{value:.6g}", "" if before is None else f"{before:.6g}")
        console.print(table)
        line(f"Scored {outcome.scored}.")
