"""Settings from a file, from options and from --set, in that order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import check_methods
from spectraqlora.settings import Settings, parse, with_overrides


def load_settings(config: Path | None, overrides: dict[str, Any], assignments: list[str]) -> Settings:
    """Read and check settings; the later source wins.

    Args:
        config: YAML file.
        overrides: settings by dotted key; None leaves one alone.
        assignments: `section.key=value`.

    Raises:
        InputError: a file, a setting or the name of a method is wrong.
    """
    values: dict[str, Any] = {}
    if config is not None:
        try:
            loaded = yaml.safe_load(config.read_text(encoding="utf-8"))
        except OSError:
            raise InputError("--config", config, "a readable YAML file") from None
        except yaml.YAMLError as error:
            raise InputError(
                "--config", config, f"valid YAML ({str(error).splitlines()[-1].strip()})"
            ) from None
        if loaded is not None and not isinstance(loaded, dict):
            raise InputError("--config", config, "a YAML mapping of settings")
        values = loaded or {}
    for key, value in overrides.items():
        if value is None:
            continue
        section, _, leaf = key.rpartition(".")
        node = values.setdefault(section, {}) if section else values
        if not isinstance(node, dict):
            raise InputError(section, node, "a mapping of settings")
        node[leaf] = value
    return check_methods(parse(with_overrides(values, assignments)))
