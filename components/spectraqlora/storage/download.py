"""Folders and files from object storage to disk: in parallel, resumable, checked.

A killed download resumes where it was. Next to every unfinished file is a journal: its first line says which
content is being fetched and in parts of which size, and every further line is the number of a part that is
on disk. Another content under the same name starts over. Parts count as finished without fsync: after a power
cut a journal may promise more than the disk holds, which the SHA-256 at the end finds.

A folder's unfinished files are kept in `.cache/` inside the target, and moved to their names when all of them
are there and right. A record of what was downloaded stays there, so that a later download of the same content
fetches nothing, and one of newer content removes what is no longer part of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from spectraqlora.errors import InputError
from spectraqlora.files import BOOKKEEPING, file_digest, name_fault, write_text
from spectraqlora.runtime.console import warn
from spectraqlora.runtime.disk import ask
from spectraqlora.storage.address import Address
from spectraqlora.storage.connection import (
    CHUNK_BYTES,
    Connection,
    ObjectChanged,
    ObjectDamaged,
    ObjectMissing,
)
from spectraqlora.storage.folders import StoredFile, find_file, read_folder, read_manifest
from spectraqlora.storage.parallel import Meter, run_all

_STAGING = f"{BOOKKEEPING}/downloading"
_RECORD = f"{BOOKKEEPING}/downloaded.json"
_TRIES = 3


class _Fetch:
    """One file on its way: parts are written where they belong and hashed in order as they come in."""

    def __init__(self, connection: Connection, file: StoredFile, partial: Path) -> None:
        self.file, self.partial = file, partial
        self._connection, self._part = connection, connection.part_bytes
        self._journal = partial.with_name(partial.name + ".journal")
        self._finished: set[int] = set()
        self._hash, self._hashed, self._hashing = hashlib.sha256(), 0, threading.Lock()
        self.resume()

    def resume(self) -> None:
        """Take over the parts that an earlier process finished; start over if they are of other content."""
        header = {"identity": self.file.identity, "size": self.file.size, "part_bytes": self._part}
        try:
            first, *lines = self._journal.read_text(encoding="utf-8").split("\n")
            same = json.loads(first) == header and self.partial.stat().st_size == self.file.size
        except (OSError, ValueError):
            same = False
        if not same:
            self.start_over()
            return
        # The last entry is empty, or a line that the kill cut short.
        self._finished = {int(line) for line in lines[:-1] if line.isdigit()}

    def start_over(self) -> None:
        """Forget everything fetched."""
        self._finished, self._hash, self._hashed = set(), hashlib.sha256(), 0
        self._journal.unlink(missing_ok=True)
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with open(self.partial, "wb") as stream:
            stream.truncate(self.file.size)
        header = {"identity": self.file.identity, "size": self.file.size, "part_bytes": self._part}
        self._journal.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def _span(self, part: int) -> tuple[int, int]:
        offset = part * self._part
        return offset, min(self._part, self.file.size - offset)

    def missing(self) -> list[int]:
        """Numbers of the parts that are not on disk."""
        count = -(-self.file.size // self._part)
        return [part for part in range(count) if part not in self._finished]

    def missing_bytes(self) -> int:
        return sum(self._span(part)[1] for part in self.missing())

    def fetch(self, part: int, meter: Meter) -> None:
        offset, length = self._span(part)
        with open(self.partial, "r+b", buffering=0) as stream:

            def keep(position: int, chunk: bytes) -> None:
                os.pwrite(stream.fileno(), chunk, position)

            self._connection.read_range(self.file.object, offset, length, keep, self.file.etag)
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(f"{part}\n")
        self._finished.add(part)
        meter.add(length)
        self._hash_ahead()

    def _hash_ahead(self) -> None:
        """Hash the finished parts that come next, while they are still in the page cache.

        Whoever finds the lock taken leaves its part to the holder, who looks once more after letting go.
        """
        while self._hashed in self._finished and self._hashing.acquire(blocking=False):
            try:
                with open(self.partial, "rb", buffering=0) as stream:
                    while self._hashed in self._finished:
                        offset, length = self._span(self._hashed)
                        while length:
                            chunk = os.pread(stream.fileno(), min(CHUNK_BYTES, length), offset)
                            self._hash.update(chunk)
                            offset, length = offset + len(chunk), length - len(chunk)
                        self._hashed += 1
            finally:
                self._hashing.release()

    def right(self) -> bool:
        """True when the file on disk is what it should be; sizes alone are known of others' objects."""
        self._hash_ahead()
        return self.file.sha256 is None or self._hash.hexdigest() == self.file.sha256

    def digest(self) -> str:
        """SHA-256 of the complete file, in hex."""
        return self._hash.hexdigest()

    def move_to(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.partial, target)
        self._journal.unlink()


def _fetch_all(connection: Connection, fetches: Sequence[_Fetch], label: str, folder: Path) -> None:
    """Fetch what is missing; a file whose SHA-256 is wrong is fetched once more.

    Raises:
        ObjectDamaged: an object that is wrong twice, named.
        InputError: no room on the disk.
    """
    needed = sum(fetch.missing_bytes() for fetch in fetches)
    ask(folder, needed, "what is fetched")
    wrong = list(fetches)
    for again in (False, True):
        for fetch in wrong if again else ():
            fetch.start_over()
        total = sum(fetch.missing_bytes() for fetch in wrong)
        meter = Meter(f"{label} once more" if again else label, total)
        missing = [(fetch, part) for fetch in wrong for part in fetch.missing()]
        # The first parts before all others: some stores compute an object's ETag when it is first asked for,
        # and would do so once for every request that comes meanwhile.
        for first in (True, False):
            jobs = [
                functools.partial(fetch.fetch, part, meter) for fetch, part in missing if (part == 0) == first
            ]
            run_all(jobs, connection.workers)
        if total:
            meter.finish()
        wrong = [fetch for fetch in wrong if not fetch.right()]
        if not wrong:
            return
    raise ObjectDamaged(
        "s3 object",
        wrong[0].file.object,
        f"content with SHA-256 {wrong[0].file.sha256}; it was fetched twice and is damaged in the store. "
        "Delete it and publish the folder again",
    )


def _read_record(target: Path) -> dict[str, list[object]]:
    try:
        record = json.loads((target / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict):
        return {}
    # Whoever could write this file could have files outside the folder removed.
    return {name: mark for name, mark in record.items() if not name_fault(name)}


def _mark(path: Path, identity: str, digest: str) -> list[object]:
    """What says that a local file is still the one that was downloaded."""
    status = path.stat()
    return [identity, status.st_size, status.st_mtime_ns, digest]


def _kept(target: Path, files: list[StoredFile], record: dict[str, list[object]]) -> dict[str, list[object]]:
    """Marks of the files that an earlier download left and that still hold what was downloaded, to the byte.

    A disk that forgets bytes keeps size and time: every file is read and hashed, several at once.
    """
    marks: dict[str, list[object]] = {}

    def look(file: StoredFile) -> None:
        path, mark = target / file.name, record.get(file.name)
        if mark is None or len(mark) != 4 or not path.is_file() or path.is_symlink():
            return
        digest = str(mark[3])
        if mark != _mark(path, file.identity, digest):
            return
        if file_digest(path) == digest == (file.sha256 or digest):
            marks[file.name] = mark
        else:
            warn(f"the copy of {file.object} in {target} is damaged and fetched again")

    run_all([functools.partial(look, file) for file in files], len(os.sched_getaffinity(0)))
    return marks


def _local_files(target: Path) -> set[str]:
    names = (path.relative_to(target) for path in target.rglob("*") if not path.is_dir())
    return {name.as_posix() for name in names if name.parts[0] != BOOKKEEPING}


def _remove(target: Path, name: str) -> None:
    """Remove a file that is no longer part of the folder, and the folders that it leaves empty."""
    path = target / name
    if any(parent.is_symlink() for parent in path.parents if parent != target and target in parent.parents):
        return
    with contextlib.suppress(OSError):
        path.unlink()
        for parent in path.parents:
            if parent == target:
                break
            parent.rmdir()


def _clear_staging(staging: Path, files: list[StoredFile]) -> None:
    """Begin anew where an earlier, unfinished download has a folder that is a file now, or a file that is a folder."""
    for file in files:
        partial = staging / file.name
        above = [parent for parent in partial.parents if staging in parent.parents]
        if partial.is_dir() or any(parent.exists() and not parent.is_dir() for parent in above):
            shutil.rmtree(staging, ignore_errors=True)
            return


def _check_links(target: Path, files: list[StoredFile]) -> None:
    """Refuse a target in which a folder is a link: what is written there would be elsewhere (InputError)."""
    for file in files:
        for parent in (target / file.name).parents:
            if parent == target:
                break
            if parent.is_symlink():
                raise InputError("target folder", parent, "a folder, and no link to another one")


def _place(connection: Connection, address: Address, files: list[StoredFile], target: Path) -> None:
    """Make the target folder hold exactly these files."""
    record = _read_record(target)
    strangers = sorted(_local_files(target) - record.keys())
    if strangers:
        raise InputError(
            "target folder", target, f"an empty folder, or an earlier download; it holds {strangers[0]}"
        )
    staging = target / _STAGING
    _clear_staging(staging, files)
    _check_links(target, files)
    kept = _kept(target, files, record)
    fetches = [_Fetch(connection, file, staging / file.name) for file in files if file.name not in kept]
    _fetch_all(connection, fetches, f"downloading {address}", target)
    # Recorded before they are moved: a kill in between leaves files that the next try knows as its own.
    marks = {fetch.file.name: _mark(fetch.partial, fetch.file.identity, fetch.digest()) for fetch in fetches}
    stale = record.keys() - kept.keys() - marks.keys()
    write_text(target / _RECORD, json.dumps({**{name: record[name] for name in stale}, **kept, **marks}))
    for name in stale:
        _remove(target, name)
    for fetch in fetches:
        fetch.move_to(target / fetch.file.name)
    write_text(target / _RECORD, json.dumps({**kept, **marks}))
    shutil.rmtree(staging, ignore_errors=True)


def download_folder(
    address: Address,
    target: Path,
    connection: Connection | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[str]:
    """Bring a folder to disk; when this returns, the target holds the whole folder and nothing else.

    Only files whose names are `wanted` count.

    Files of a published folder are checked against the SHA-256 of its manifest; of folders without manifest,
    the sizes. Resumes what an earlier call began. Memory: at most workers x 1 MiB.

    Returns:
        The files' names, relative to the target.

    Raises:
        InputError: nothing there, an unfinished upload, a damaged object, foreign files in the target, no
            room on the disk, or a store that refuses; always one line.
    """
    connection = connection or Connection()
    target.mkdir(parents=True, exist_ok=True)
    for remaining in reversed(range(_TRIES)):
        version, files = read_folder(connection, address)
        files = [file for file in files if wanted(file.name)]
        try:
            _place(connection, address, files, target)
            return [file.name for file in files]
        except (ObjectMissing, ObjectChanged):
            # A publisher replaced the folder meanwhile: read its new table, keep what is still right.
            if not remaining or _unchanged(connection, address, version):
                raise
    raise AssertionError("the last try returns or raises")


def _unchanged(connection: Connection, address: Address, version: str | None) -> bool:
    if version is None:
        return False
    manifest = read_manifest(connection, address)
    return manifest is not None and manifest.version == version


def download_file(address: Address, target: Path, connection: Connection | None = None) -> None:
    """Bring one object to disk under the given name; checked against its SHA-256 where it was stored with one.

    Resumes what an earlier call began; a target that is right already is left alone.

    Raises:
        InputError: no such object, a damaged one, no room on the disk, or a store that refuses.
    """
    connection = connection or Connection()
    target.parent.mkdir(parents=True, exist_ok=True)
    for remaining in reversed(range(_TRIES)):
        file = find_file(connection, address)
        if (
            file.sha256
            and target.is_file()
            and target.stat().st_size == file.size
            and file_digest(target) == file.sha256
        ):
            return
        fetch = _Fetch(connection, file, target.with_name(f".{target.name}.partial"))
        with contextlib.suppress(ObjectChanged) if remaining else contextlib.nullcontext():
            _fetch_all(connection, [fetch], f"downloading {address}", target.parent)
            fetch.move_to(target)
            return
