"""The step's work: the champion's rank map and adapter, where they fit this run."""

from __future__ import annotations

import shutil
from pathlib import Path

from spectraqlora.artifacts import RankMap, write_nothing
from spectraqlora.errors import InputError


def start_from(
    champion: tuple[int, Path] | None, rank_map: Path, start_rank_map: Path, start_adapter: Path
) -> str:
    """Write the rank map and the adapter to start from; says in words which.

    Args:
        champion: its version and the folder of its adapter with rank map.
        rank_map: folder of this run's rank map.
        start_rank_map: folder for the rank map.
        start_adapter: folder for the adapter; it holds nothing but the reason where training starts from the base.
    """
    fresh = RankMap.read(rank_map)
    if champion is None:
        reason = "there is no champion with an adapter"
    else:
        version, folder = champion
        theirs = _readable(folder)
        if theirs is None:
            reason = (
                f"the rank map of the champion, version {version}, comes from another version of this project"
            )
        elif theirs.method != fresh.method:
            reason = f"the champion, version {version}, was trained with {theirs.method}"
        elif theirs.base_digest != fresh.base_digest:
            reason = f"the champion, version {version}, has another base model"
        else:
            theirs.model_copy(update={"round": 1, "changes": []}).write(start_rank_map)
            shutil.copytree(folder, start_adapter, dirs_exist_ok=True)
            return f"from the adapter of the champion, version {version}"
    shutil.copytree(rank_map, start_rank_map, dirs_exist_ok=True)
    write_nothing(start_adapter, f"training starts from the base: {reason}")
    return f"from the base: {reason}"


def _readable(folder: Path) -> RankMap | None:
    """The champion's rank map; none where it is of another schema, for a champion stays until another one is better."""
    try:
        return RankMap.read(folder)
    except InputError:
        return None
