"""The command models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text
from spectraqlora.errors import InputError
from spectraqlora.settings import HIGHER_IS_BETTER, LOWER_IS_BETTER, Settings

from spectraqlora_pipelines.cli.options import ConfigOrVariable, Set
from spectraqlora_pipelines.cli.registry import Name, Uri, registry_settings
from spectraqlora_pipelines.cli.screen import console

if TYPE_CHECKING:
    from spectraqlora.tracking.registry import Version


def models(uri: Uri = "", name: Name = "", config: ConfigOrVariable = None, set_: Set = None) -> None:
    """List a registered model's versions with aliases and numbers.

    Example: spectraqlora models --uri runs/demo
    """
    from spectraqlora.tracking.registry import Registry

    settings = registry_settings(uri, name, config, set_)
    versions = Registry(settings.tracking).versions()
    if not versions:
        raise InputError("--name", settings.tracking.registered_model, "a registered model with versions")
    console.print(_table(settings, versions))


def _table(settings: Settings, versions: list[Version]) -> Table:
    from spectraqlora.tracking.registry import COMPLETING_TAG, TEST_LOSS

    named = settings.promote.metric
    decides = [TEST_LOSS, COMPLETING_TAG] if named == "auto" else [named]
    wanted = [*decides, *settings.promote.bounds, "accuracy", "trainable_parameters"]
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
    for version in versions:
        table.add_row(
            str(version.number),
            Text("\n").join(Text(a, "bold green" if a == "champion" else "") for a in version.aliases),
            version.tags.get("method", ""),
            *(_number(version.metrics.get(metric)) for metric in columns),
            version.tags.get("promotion.decision", ""),
        )
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
