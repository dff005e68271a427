"""The detect-changes step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from spectraqlora.files import write_text
from spectraqlora.runtime.console import say
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import DataSettings, TrackingSettings


@step
def run(
    *,
    source: str,
    data_settings: dict[str, Any],
    tracking_settings: dict[str, Any],
    recipe: str,
    changes: Any,
) -> str:
    from spectraqlora.steps.detect_changes.changes import UNCHANGED, changed_since_champion, source_digest
    from spectraqlora.tracking.registry import Registry

    registry = Registry(TrackingSettings(**tracking_settings))
    digest = source_digest(DataSettings(**{**data_settings, "source": source}))
    result = changed_since_champion(digest, recipe, registry.versions())
    say(f"{'training' if result.changed else 'stopping early'}: {result.reason}")
    write_text(output_folder(changes) / "changes.json", json.dumps(asdict(result), indent=1))
    return result.digest if result.changed else UNCHANGED
