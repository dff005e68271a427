"""The close-runs step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import json
from typing import Any

from spectraqlora.files import write_text
from spectraqlora.runtime.console import say
from spectraqlora.runtime.run_key import run_key
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import TrackingSettings


@step
def run(*, tracking_settings: dict[str, Any], status: Any, closed: Any) -> None:
    from spectraqlora.steps.close_runs.ends import end_of
    from spectraqlora.tracking.runs import Tracker

    folder = output_folder(closed)
    end = end_of(status if isinstance(status, str) else status.state)
    runs: dict[str, str] = {}
    tracker = Tracker(TrackingSettings(**tracking_settings), run_key())
    tracker.retry_while_away(lambda: runs.update(tracker.close_stale(end)), "that the run has ended")
    for name in runs.values():
        say(f"no step has ended the MLflow run {name}; it is {end}")
    write_text(folder / "closed.json", json.dumps(runs, indent=1))
