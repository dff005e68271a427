"""Folders and files from disk to object storage: in parallel, resumable, published as a whole.

How a published folder looks, and why a reader never sees half of one, is described in `folders`.

A killed upload resumes where it was: the same content goes to the same keys, so files that are there with the
size and SHA-256 they should have are skipped, and of a file that was under way the parts that arrived are.
"""

from __future__ import annotations

import email.utils
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

from spectraqlora.errors import InputError
from spectraqlora.files import BOOKKEEPING, file_digest, names_fault
from spectraqlora.runtime.console import say
from spectraqlora.storage.address import Address
from spectraqlora.storage.connection import MIB, Connection, ObjectMissing
from spectraqlora.storage.folders import (
    MANIFEST,
    VERSION_FOLDER,
    VERSION_PREFIX,
    FileEntry,
    FolderManifest,
    objects_below,
    open_uploads,
    read_manifest,
    stored_sha256,
    version_folder,
)
from spectraqlora.storage.parallel import Meter, run_all

_MOST_PARTS = 10_000
_ABANDONED = timedelta(days=1)


class _Sending:
    """One file on its way into the store."""

    def __init__(
        self,
        connection: Connection,
        path: Path,
        entry: FileEntry,
        target: Address,
        stored: int | None,
        by_part: bool,
    ) -> None:
        self._connection, self._path, self._entry, self._target = connection, path, entry, target
        self._stored, self._by_part, self._status = stored, by_part, path.stat()
        # S3 takes 10,000 parts at most: very large files are sent in larger ones.
        self._part = max(connection.part_bytes, -(-entry.size // _MOST_PARTS // MIB + 1) * MIB)
        self._upload, self._tags = "", dict[int, str]()
        self._lock = threading.Lock()

    def _read(self, part: int) -> bytes:
        offset = part * self._part
        length = min(self._part, self._entry.size - offset)
        with open(self._path, "rb", buffering=0) as stream:
            content = os.pread(stream.fileno(), length, offset)
        self._check_unchanged(len(content) == length)
        return content

    def _check_unchanged(self, whole: bool = True) -> None:
        status = self._path.stat()
        if not whole or (status.st_size, status.st_mtime_ns) != (
            self._status.st_size,
            self._status.st_mtime_ns,
        ):
            raise InputError("file", self._path, "a file that does not change while it is uploaded")

    def _arrived(self) -> bool:
        """True where the object is there with the right size and SHA-256."""
        try:
            reply = self._connection.call("head_object", self._target, Key=self._target.key)
        except ObjectMissing:
            return False
        return reply["ContentLength"] == self._entry.size and stored_sha256(reply) == self._entry.sha256

    def begin(self, meter: Meter) -> list[Callable[[], None]]:
        """Skip, or send as one object, or return the parts that are still to be sent."""
        if self._stored == self._entry.size and self._arrived():
            meter.add(self._entry.size)
            return []
        if self._entry.size <= self._part:
            self._connection.call(
                "put_object",
                self._target,
                Key=self._target.key,
                Body=self._read(0),
                Metadata={"sha256": self._entry.sha256},
            )
            self._check_unchanged()
            meter.add(self._entry.size)
            return []
        self._take_up(meter)
        parts = range(-(-self._entry.size // self._part))
        missing = [part for part in parts if part not in self._tags]
        if not missing:
            self._complete()
        return [functools.partial(self._send, part, len(parts), meter) for part in missing]

    def _take_up(self, meter: Meter) -> None:
        """Resume an upload that was started, if its parts are this file's; else start one."""
        for upload in open_uploads(self._connection, self._target, self._target.key):
            if upload["Key"] != self._target.key:
                continue
            if self._by_part and not self._upload and self._matching(upload["UploadId"], meter):
                self._upload = upload["UploadId"]
            else:
                self._connection.call(
                    "abort_multipart_upload",
                    self._target,
                    Key=self._target.key,
                    UploadId=upload["UploadId"],
                )
        if not self._upload:
            reply = self._connection.call(
                "create_multipart_upload",
                self._target,
                Key=self._target.key,
                Metadata={"sha256": self._entry.sha256},
            )
            self._upload = reply["UploadId"]

    def _matching(self, upload: str, meter: Meter) -> bool:
        """Record which parts of an upload hold this file's bytes; False where one holds others."""
        tags: dict[int, str] = {}
        marker: dict[str, int] = {}
        while True:
            page = self._connection.call(
                "list_parts", self._target, Key=self._target.key, UploadId=upload, **marker
            )
            for entry in page.get("Parts", []):
                part, tag = int(entry["PartNumber"]) - 1, entry["ETag"]
                if part * self._part >= self._entry.size:
                    return False
                content = self._read(part)
                # Encrypted buckets have ETags of their own making: such parts are sent again.
                if hashlib.md5(content, usedforsecurity=False).hexdigest() != tag.strip('"'):
                    return False
                tags[part] = tag
            if not page.get("IsTruncated"):
                break
            marker = {"PartNumberMarker": int(page["NextPartNumberMarker"])}
        self._tags = tags
        meter.add(sum(min(self._part, self._entry.size - part * self._part) for part in tags))
        return True

    def _send(self, part: int, count: int, meter: Meter) -> None:
        content = self._read(part)
        reply = self._connection.call(
            "upload_part",
            self._target,
            Key=self._target.key,
            UploadId=self._upload,
            PartNumber=part + 1,
            Body=content,
        )
        meter.add(len(content))
        with self._lock:
            self._tags[part] = reply["ETag"]
            last = len(self._tags) == count
        if last:
            self._complete()

    def _complete(self) -> None:
        self._check_unchanged()
        parts = [{"PartNumber": part + 1, "ETag": tag} for part, tag in sorted(self._tags.items())]
        try:
            self._connection.call(
                "complete_multipart_upload",
                self._target,
                Key=self._target.key,
                UploadId=self._upload,
                MultipartUpload={"Parts": parts},
            )
        except InputError:
            # A reply that was lost on the way leaves an object that is complete and an upload that is gone.
            if not self._arrived():
                raise


def _send_all(connection: Connection, files: Sequence[_Sending], label: str, size: int) -> None:
    meter = Meter(label, size)
    parts: list[list[Callable[[], None]]] = [[] for _ in files]

    def begin(index: int) -> None:
        parts[index] = files[index].begin(meter)

    run_all([functools.partial(begin, index) for index in range(len(files))], connection.workers)
    run_all([job for jobs in parts for job in jobs], connection.workers)
    meter.finish()


def _hash(path: Path) -> FileEntry:
    return FileEntry(size=path.stat().st_size, sha256=file_digest(path))


def _local_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError("folder to upload", folder, "an existing folder")
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if BOOKKEEPING in relative.parts or not path.is_file():
            continue
        files[relative.as_posix()] = path
    name, fault = names_fault(files)
    if fault:
        raise InputError("file to upload", files[name], f"another name: {fault}")
    if not files:
        raise InputError("folder to upload", folder, "a folder with files in it")
    return files


def upload_folder(folder: Path, address: Address, connection: Connection | None = None) -> str:
    """Publish a folder; readers see what was there before until all of it has arrived.

    Everything but `.cache/` is uploaded, links as the files they lead to. Memory: at most
    workers x part size (128 MiB by default).

    Returns:
        Address of the folder that holds the plain files, for clients that do not know the manifest.

    Raises:
        InputError: no folder or an empty one, a file that changes meanwhile, or a store that refuses.
    """
    connection = connection or Connection()
    paths = _local_files(folder)
    # The first request comes before the hashing: a wrong secret is reported at once.
    current = read_manifest(connection, address)
    with ThreadPoolExecutor(min(4, connection.workers), "hash") as pool:
        entries = dict(zip(paths, pool.map(_hash, paths.values()), strict=True))
    manifest = FolderManifest.of(entries)
    if current is not None:
        same = current.version == manifest.version
        manifest.previous = current.previous if same else current.version
    target = manifest.folder(address)
    stored = {name: int(entry["Size"]) for name, entry in objects_below(connection, target)}
    files = [
        _Sending(connection, paths[name], entry, target.child(name), stored.get(name), by_part=True)
        for name, entry in entries.items()
    ]
    size = sum(entry.size for entry in entries.values())
    _send_all(connection, files, f"uploading {address}", size)
    where = address.child(MANIFEST)
    reply = connection.call(
        "put_object",
        where,
        Key=where.key,
        Body=manifest.model_dump_json(indent=1).encode(),
        ContentType="application/json",
    )
    replaced = current.previous if current is not None and current.version != manifest.version else None
    # The store's own clock: the times of its objects are read off the same one.
    now = email.utils.parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
    try:
        _remove_old(connection, address, manifest, replaced, now)
    except InputError as error:
        # Published all the same: a writer need not have the permission to delete.
        say(f"note: what is left of earlier uploads stays: {error}")
    return str(target)


def _remove_old(
    connection: Connection, address: Address, manifest: FolderManifest, replaced: str | None, now: datetime
) -> None:
    """Remove the version before the previous one, and uploads that nobody resumed for a day."""
    start = address.below + VERSION_PREFIX
    page = connection.call("list_objects_v2", address, Prefix=start, Delimiter="/")
    for common in page.get("CommonPrefixes", []):
        match = VERSION_FOLDER.fullmatch(common["Prefix"][len(address.below) :])
        if match is None or match[1] in (manifest.version, manifest.previous):
            continue
        folder = version_folder(address, match[1])
        objects = list(objects_below(connection, folder))
        if match[1] == replaced or all(now - entry["LastModified"] > _ABANDONED for _, entry in objects):
            for name, _ in objects:
                connection.call("delete_object", folder, Key=folder.child(name).key)
    for upload in open_uploads(connection, address, start):
        if now - upload["Initiated"] > _ABANDONED:
            connection.call("abort_multipart_upload", address, Key=upload["Key"], UploadId=upload["UploadId"])


def upload_file(path: Path, address: Address, connection: Connection | None = None) -> None:
    """Store one file under the given key, with its SHA-256 as metadata; skipped where it is there already.

    An object is replaced in one go: readers see the old content or the new.

    Raises:
        InputError: no such file, one that changes meanwhile, or a store that refuses.
    """
    if not path.is_file():
        raise InputError("file to upload", path, "an existing file")
    connection = connection or Connection()
    entry = _hash(path)
    page = connection.call("list_objects_v2", address, Prefix=address.key, MaxKeys=1)
    stored = {listed["Key"]: int(listed["Size"]) for listed in page.get("Contents", [])}
    # An upload started under this key may have been announced with another content's SHA-256, even where its
    # first parts are alike; only a version's keys stand for one content.
    sending = _Sending(connection, path, entry, address, stored.get(address.key), by_part=False)
    _send_all(connection, [sending], f"uploading {address}", entry.size)
