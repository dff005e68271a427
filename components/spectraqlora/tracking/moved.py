"""MLflow's SQLite database in a work directory that was moved, renamed or copied.

MLflow stores where artifacts are as absolute addresses: of a moved work directory it would load nothing, and would write
to where that was before. Ours are in `mlartifacts` beside the database, so what it says of them is corrected.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from spectraqlora.runtime.console import say

SQLITE = "sqlite:///"
ARTIFACTS = "mlartifacts"
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("tags", "value"),
    ("model_version_tags", "value"),
)
_WAIT_S = 60.0


def artifact_location(uri: str) -> str | None:
    """Where the artifacts of an SQLite tracking URI are: beside the database; None for other stores."""
    if not uri.startswith(SQLITE):
        return None
    return (Path(uri.removeprefix(SQLITE)).absolute().parent / ARTIFACTS).as_uri()


def follow_move(uri: str) -> None:
    """Correct the addresses in a database that has its artifacts beside it, and says that they are elsewhere."""
    location = artifact_location(uri)
    if location is None:
        return
    database = Path(uri.removeprefix(SQLITE)).absolute()
    folder = database.parent / ARTIFACTS
    if not (database.is_file() and folder.is_dir()):
        return
    with contextlib.closing(sqlite3.connect(database, timeout=_WAIT_S)) as store:
        known = {name for (name,) in store.execute("select name from sqlite_master where type = 'table'")}
        if "experiments" not in known:
            return
        query = (
            f"select distinct artifact_location from experiments where artifact_location like '%/{ARTIFACTS}'"
        )
        for (before,) in store.execute(query).fetchall():
            if before == location or _same(before, folder):
                continue
            old_home = unquote(urlsplit(before).path).removesuffix(f"/{ARTIFACTS}")
            with store:
                for table, column in _COLUMNS:
                    if table in known:
                        _replace(store, table, column, before, location)
                        _replace(store, table, column, f"{old_home}/", f"{database.parent}/")
            say(f"{database}: was in {old_home} before; its artifacts are looked for beside it")


def _same(address: str, folder: Path) -> bool:
    """Whether an address is another name of a folder."""
    try:
        return os.path.samefile(unquote(urlsplit(address).path), folder)
    except OSError:
        return False


def _replace(store: sqlite3.Connection, table: str, column: str, before: str, after: str) -> None:
    """Another beginning for the values that begin so."""
    store.execute(
        f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
        (after, len(before) + 1, len(before), before),
    )
