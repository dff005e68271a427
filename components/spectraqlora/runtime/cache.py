"""The user's cache: what can be recomputed, and takes long."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path


def cache_folder() -> Path:
    """`spectraqlora` in the user's cache folder; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectraqlora"


def plainly_named(folder: Path) -> Path:
    """A name of a folder that can stand in a URI: its own, or that of a link in the cache.

    MLflow takes `?`, `#` and `%` in the path of a database for parts of its URI, and writes elsewhere.
    """
    folder = folder.absolute()
    if not re.search("[?#%]", str(folder)):
        return folder
    link = cache_folder() / "folders" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder)
    return link
