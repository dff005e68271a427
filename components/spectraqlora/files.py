"""Files written completely or not at all, and digests of files and folders."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from spectraqlora.errors import InputError

PARTIAL = ".partial"
"""After the name of a file that is still written."""
BOOKKEEPING = ".cache"
"""Folder of download records and the like; never part of a model or a data set."""


def write_text(path: Path, text: str) -> None:
    """Write completely or not at all: a reader never sees half a file."""
    with complete(path) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A name beside `path` to write at: what is there becomes `path` at the end, and is removed where the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with naming(path):
            yield partial
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, a write that fails names its file, as opening one does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def check_output(path: Path, field: str, folder: bool = False) -> None:
    """Refuse, before the work that it is for, a place where no file can be written; nothing of this stays there.

    Args:
        path: where a file, or a folder, is to be.
        field: the option or setting that names it.
        folder: whether it is a folder of files.

    Raises:
        InputError: another kind of thing is there, or above it; a name that is too long or has a NUL; a folder or disk that
            cannot be written.
    """
    wanted = "folder" if folder else "file"
    try:
        _check_kind(path, field, folder)
        new: list[str] = []
        home = path if folder else path.parent
        while not home.exists():
            new, home = [home.name, *new], home.parent
        for name in new if folder else [*new, path.name + PARTIAL]:
            (home / name).exists()  # Too long for a file system is what it says to any question.
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise InputError(field, path, f"a {wanted} that can be written ({error.strerror})") from None


def _check_kind(path: Path, field: str, folder: bool) -> None:
    wanted = "folder" if folder else "file"
    if "\0" in str(path):
        raise InputError(field, path, f"the path of a {wanted}, without NUL characters")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode) != folder or not (folder or stat.S_ISREG(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "no regular file"
        raise InputError(field, path, f"a {wanted}; this is {kind}")


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


def names_fault(names: Iterable[str]) -> tuple[str, str]:
    """The first of a folder's names that is wrong, and what is wrong with it; both empty where nothing is.

    Besides what `name_fault` says: names that differ in case alone, of which some file systems keep one, and a file
    that is called as a folder of other files.
    """
    known: dict[str, str] = {}
    folders: set[str] = set()
    for name in names:
        if fault := name_fault(name):
            return name, fault
        if (folded := name.casefold()) in known:
            return name, f"{known[folded]!r} differs in case alone"
        known[folded] = name
        parts = folded.split("/")
        folders |= {"/".join(parts[:end]) for end in range(1, len(parts))}
    clash = next((name for folded, name in known.items() if folded in folders), "")
    return clash, "it is a file, and a folder of others" if clash else ""


def apply_umask(folder: Path) -> None:
    """Give a folder's files the mode that a new file has: safetensors are written for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def link_or_copy(source: str, target: str) -> str:
    """A second name of a file where the file system has that, else a copy; for `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def name_fault(name: str) -> str:
    """What is wrong with a file's name that comes from outside (an index, a bucket, an archive); empty where nothing is.

    Names are relative, with / between folders: they must stay inside their folder on every file system, away from
    the folder's own bookkeeping, and readable where they are shown.
    """
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts):
        return "it is empty, absolute, or has empty, . or .. segments"
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name) or "\\" in name:
        return "it has control characters or a backslash"
    if any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        return "it is no text that a file system takes"
    if parts[0].casefold() == BOOKKEEPING:
        return f"it is below {BOOKKEEPING}/, where downloads keep their records"
    if any(len(part.encode()) > 255 for part in parts):
        return "a segment of it is longer than 255 bytes"
    return ""
