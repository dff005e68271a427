"""The user's cache: what can be recomputed, and takes long."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`spectraqlora` in the user's cache folder; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectraqlora"
