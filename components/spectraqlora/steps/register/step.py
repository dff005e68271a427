"""The register step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import PreparedRows
from spectraqlora.files import write_text
from spectraqlora.runtime.run_key import run_key
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import TrackingSettings


@step
def run(
    *,
    tracking_settings: dict[str, Any],
    origin: dict[str, str],
    rows: Any,
    winner: Any,
    exported: Any,
    leaderboard: Any,
    registered: Any,
) -> None:
    from spectraqlora.steps.register.register import Inputs, register
    from spectraqlora.tracking.results import log_results, results_logged
    from spectraqlora.tracking.runs import Tracker

    inputs = Inputs(Path(rows.path), Path(winner.path), Path(exported.path), exported.uri)
    tracker = Tracker(TrackingSettings(**tracking_settings), run_key(), "register")
    if not results_logged(tracker):
        # Steps that were taken from the cache sent nothing to this run.
        log_results(tracker, Path(leaderboard.path), inputs.rows)
    name, version = register(tracker, inputs, origin)
    pipeline_run = tracker.pipeline_run()
    tracker.log_data(pipeline_run, PreparedRows.read(inputs.rows))
    write_text(output_folder(registered) / "registered.json", json.dumps({"name": name, "version": version}))
    registered.metadata.update(name=name, version=version)
    if address := tracker.address(pipeline_run):
        # What KFP's UI shows of the artifact: the way from the pipeline run to MLflow's.
        registered.metadata["mlflow_run"] = address
    tracker.finish(pipeline_run)
