"""The start-point step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import TrackingSettings


@step
def run(tracking: dict[str, Any], ranks: Any, start_ranks: Any, start_adapter: Any) -> None:
    from spectraqlora.steps.start_point.champion import start_from
    from spectraqlora.tracking.registry import Registry

    registry = Registry(TrackingSettings(**tracking))
    with tempfile.TemporaryDirectory() as scratch:
        found = registry.champion_adapter(Path(scratch))
        champion = (found[0].number, found[1]) if found else None
        said = start_from(
            champion, Path(ranks.path), output_folder(start_ranks), output_folder(start_adapter)
        )
    print(f"training starts {said}", flush=True)
