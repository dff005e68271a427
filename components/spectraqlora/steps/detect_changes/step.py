"""The detect-changes step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from spectraqlora.files import write_text
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import DataSettings, TrackingSettings


@step
def run(source: str, settings: dict[str, Any], tracking: dict[str, Any], recipe: str, changes: Any) -> str:
    from spectraqlora.steps.detect_changes.changes import UNCHANGED, compare, source_digest
    from spectraqlora.tracking.registry import Registry

    registry = Registry(TrackingSettings(**tracking))
    digest = source_digest(DataSettings(**{**settings, "source": source}))
    found = compare(digest, recipe, registry.versions())
    print(f"{'training' if found.changed else 'stopping early'}: {found.reason}", flush=True)
    write_text(output_folder(changes) / "changes.json", json.dumps(asdict(found), indent=1))
    return found.digest if found.changed else UNCHANGED
