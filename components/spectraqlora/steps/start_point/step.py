"""The start-point step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from spectraqlora.runtime.console import say
from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import TrackingSettings


@step
def run(*, tracking_settings: dict[str, Any], rank_map: Any, start_rank_map: Any, start_adapter: Any) -> None:
    from spectraqlora.steps.start_point.champion import start_from
    from spectraqlora.tracking.registry import Registry

    registry = Registry(TrackingSettings(**tracking_settings))
    with tempfile.TemporaryDirectory() as scratch:
        stored = registry.champion_adapter(Path(scratch))
        champion = (stored[0].number, stored[1]) if stored else None
        origin = start_from(
            champion, Path(rank_map.path), output_folder(start_rank_map), output_folder(start_adapter)
        )
    say(f"training starts {origin}")
