"""Options that several commands have, and the settings that these and a file say together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from spectraqlora.data.known_templates import portable
from spectraqlora.documents import read_yaml
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import check_methods, names
from spectraqlora.settings import Settings, merged, parse, preset, with_overrides

Methods = Annotated[str | None, typer.Option(metavar="LIST", help=f"{', '.join(names())}.")]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file of settings.")]
ConfigOrVariable = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", envvar="SPECTRAQLORA_CONFIG", show_envvar=False, help="YAML file of settings."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting, section.key; may be repeated."),
]
_PRESET = "default, or seed: as first published."
Preset = Annotated[str, typer.Option(metavar="NAME", show_default=False, help=_PRESET)]
PresetOrVariable = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar="NAME",
        envvar="SPECTRAQLORA_PRESET",
        show_envvar=False,
        show_default=False,
        help=_PRESET,
    ),
]
Markdown = Annotated[bool, typer.Option("--markdown", help="As a table for documents.")]


def load_settings(
    config: Path | None,
    overrides: dict[str, Any],
    assignments: list[str] | None,
    preset_name: str = "default",
) -> Settings:
    """Read and check settings: from a preset, a file, from options and from --set; the later source wins.

    Args:
        config: YAML file.
        overrides: settings by dotted key; None leaves one alone.
        assignments: `section.key=value`.
        preset_name: what holds where nothing else is said.

    Raises:
        InputError: a file, a setting or the name of a preset or a method is wrong.
    """
    values = merged(preset(preset_name), _read(config) if config is not None else {})
    for key, value in overrides.items():
        if value is None:
            continue
        section, _, leaf = key.rpartition(".")
        node = values.setdefault(section, {}) if section else values
        if not isinstance(node, dict):
            raise InputError(section, node, "a mapping of settings")
        node[leaf] = value
    settings = check_methods(parse(with_overrides(values, assignments or [])))
    data = settings.data.model_copy(update={"chat_template": portable(settings.data.chat_template)})
    return settings.model_copy(update={"data": data})


def given_data(sources: Sequence[str] | None) -> dict[str, Any]:
    """What an option that may be given several times says of the data; nothing where it is not given."""
    if not sources:
        return {}
    if len(sources) == 1:
        return {"data.source": sources[0], "data.sources": []}
    return {"data.source": "sample", "data.sources": [{"source": source} for source in sources]}


def _read(config: Path) -> dict[str, Any]:
    config = config.expanduser()
    try:
        values = read_yaml(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise InputError("--config", config, "a readable YAML file") from None
    except ValueError as error:
        raise InputError("--config", config, f"valid YAML ({error})") from None
    if values is not None and not isinstance(values, dict):
        raise InputError("--config", config, "a YAML mapping of settings")
    return values or {}
