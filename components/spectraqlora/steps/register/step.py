"""The register step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, MergedModel, PreparedRows
from spectraqlora.files import folder_digest, write_text
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import TrackingSettings


@step
def run(
    *,
    run_key: str,
    tracking_settings: dict[str, Any],
    origin: dict[str, str],
    rows: Any,
    winner: Any,
    exported: Any,
    registered: Any,
) -> None:
    from spectraqlora.steps.register.register import register
    from spectraqlora.tracking.runs import REVISION, Tracker

    section = TrackingSettings(**tracking_settings)
    tracker = Tracker(section, run_key, "register")
    run = tracker.pipeline_run()
    evaluation, merged = Evaluation.read(winner.path), MergedModel.read(exported.path)
    tags = {
        "method": evaluation.method,
        "base_digest": evaluation.base_digest,
        "data_digest": evaluation.data_digest,
        "merged_digest": folder_digest(Path(exported.path) / "merged"),
        "merged_into": merged.merged_into,
        "spectraqlora_version": __version__,
        "run_key": run_key,
        **{name: value for name, value in origin.items() if value},
    }
    if os.environ.get(REVISION):
        tags["source_revision"] = os.environ[REVISION]
    loss = merged.verified_eval_loss if section.registered_form == "merged" else merged.eval_loss_original
    name, version = register(
        tracker,
        Path(exported.path),
        Path(winner.path),
        Path(rows.path),
        tags,
        {**evaluation.headline(), "merged_eval_loss": loss},
    )
    tracker.log_data(run, PreparedRows.read(rows.path))
    write_text(output_folder(registered) / "registered.json", json.dumps({"name": name, "version": version}))
    registered.metadata.update(name=name, version=version)
    tracker.finish(run)
