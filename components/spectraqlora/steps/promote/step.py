"""The promote step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectraqlora.files import write_text
from spectraqlora.runtime.console import say
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import EvaluateSettings, ExportSettings, PromoteSettings, TrackingSettings
from spectraqlora.signing import REQUIRED


@step
def run(
    *,
    tracking_settings: dict[str, Any],
    promote_settings: dict[str, Any],
    evaluate_settings: dict[str, Any],
    export_settings: dict[str, Any],
    registered: Any,
    decision: Any,
) -> None:
    from spectraqlora.steps.promote.promotion import Promotion
    from spectraqlora.tracking.registry import CHAMPION, Registry

    section = PromoteSettings(**promote_settings)
    version = json.loads((Path(registered.path) / "registered.json").read_text(encoding="utf-8"))
    registry = Registry(TrackingSettings(**{**tracking_settings, "registered_model": version["name"]}))
    promotion = Promotion(
        registry,
        registry.version(version["version"]),
        section,
        EvaluateSettings(**evaluate_settings),
        ExportSettings(**export_settings).signature == REQUIRED,
    )
    # A gate that is off still says what it would have said.
    outcome = promotion.run(dry_run=not section.enabled)
    say(f"version {outcome.version}: {outcome.decision}: {outcome.reason}")
    for name, value in (
        *outcome.challenger.items(),
        *((f"champion_{k}", v) for k, v in outcome.champion.items()),
    ):
        decision.log_metric(name, value)
    champion = registry.by_alias(CHAMPION)
    document = {**asdict(outcome), "enabled": section.enabled, "now": champion.number if champion else None}
    write_text(output_folder(decision) / "decision.json", json.dumps(document, indent=1))
