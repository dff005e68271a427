"""Files written completely or not at all, and digests of files and folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from spectraqlora.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write completely or not at all: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def file_digest(path: Path) -> str:
    """SHA-256 of one file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digest(folder: Path, patterns: Sequence[str] = ("*",)) -> str:
    """SHA-256 over names and contents of a folder's files, in hex.

    Links count by the content that they lead to, as a hub cache's snapshots have them. What is below a `.cache`
    inside the folder is a download's bookkeeping and does not count; where the folder itself is does not matter.

    Args:
        folder: its files at any depth.
        patterns: of the names that count, relative to the folder, as the shell knows them.

    Raises:
        InputError: no file counts, so that the digest would stand for nothing.
    """
    names = sorted(
        name
        for path in folder.rglob("*")
        if path.is_file()
        and ".cache" not in (name := path.relative_to(folder)).parts
        and any(fnmatch(name.as_posix(), pattern) for pattern in patterns)
    )
    if not names:
        raise InputError("folder", folder, "a folder with files; a digest of none would equal every other")
    total = hashlib.sha256()
    for name in names:
        total.update(f"{name.as_posix()}\0{file_digest(folder / name)}\n".encode())
    return total.hexdigest()
