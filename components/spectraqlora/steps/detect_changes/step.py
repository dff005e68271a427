"""The detect-changes step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectraqlora.files import write_text
from spectraqlora.runtime.console import say
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import ModelSettings, SnrSettings, TrackingSettings, data_section


@step
def run(
    *,
    source: str,
    base_model: str,
    base_content: str,
    table_content: str,
    data_settings: dict[str, Any],
    model_settings: dict[str, Any],
    snr_settings: dict[str, Any],
    tracking_settings: dict[str, Any],
    recipe: str,
    changes: Any,
    base_digest: str,
    table_digest: str,
    full_recipe: str,
) -> str:
    from spectraqlora.steps.detect_changes.changes import (
        UNCHANGED,
        base_content_of,
        changed_since_champion,
        recipe_with,
        source_digest,
        table_content_of,
    )
    from spectraqlora.tracking.registry import Registry

    registry = Registry(TrackingSettings(**tracking_settings))
    base = base_content or base_content_of(ModelSettings(**{**model_settings, "base_model": base_model}))
    table = table_content or table_content_of(SnrSettings(**snr_settings))
    everything = recipe_with(recipe, base, table)
    digest = source_digest(data_section(data_settings, source))
    result = changed_since_champion(digest, everything, registry.versions())
    say(f"{'training' if result.changed else 'stopping early'}: {result.reason}")
    for path, text in ((base_digest, base), (table_digest, table), (full_recipe, everything)):
        write_text(Path(path), text)
    write_text(output_folder(changes) / "changes.json", json.dumps(asdict(result), indent=1))
    return result.digest if result.changed else UNCHANGED
