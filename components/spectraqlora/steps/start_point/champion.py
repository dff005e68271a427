"""The step's work: the champion's rank map and adapter, where they fit this run."""

from __future__ import annotations

import shutil
from pathlib import Path

from spectraqlora.artifacts import RankMap


def start_from(found: tuple[int, Path] | None, ranks: Path, ranks_out: Path, adapter_out: Path) -> str:
    """Write the rank map and the adapter to start from; says in words which.

    Args:
        found: the champion's version and the folder of its adapter with rank map.
        ranks: folder of this run's rank map.
        ranks_out: folder for the rank map.
        adapter_out: folder for the adapter; stays empty where training starts from the base.
    """
    fresh = RankMap.read(ranks)
    if found is None:
        reason = "there is no champion with an adapter"
    else:
        version, folder = found
        theirs = RankMap.read(folder)
        if theirs.method != fresh.method:
            reason = f"the champion, version {version}, was trained with {theirs.method}"
        elif theirs.base_digest != fresh.base_digest:
            reason = f"the champion, version {version}, has another base model"
        else:
            theirs.model_copy(update={"round": 1, "changes": []}).write(ranks_out)
            shutil.copytree(folder, adapter_out, dirs_exist_ok=True)
            return f"from the adapter of the champion, version {version}"
    shutil.copytree(ranks, ranks_out, dirs_exist_ok=True)
    return f"from the base: {reason}"
