"""What a folder in object storage consists of, and how it is published.

A folder published at `s3://bucket/prefix` looks like this:

    prefix/_manifest.json                  name -> size, SHA-256 of every file; which version is current
    prefix/_files-<version>/config.json    the files themselves

`version` is the start of the SHA-256 over the manifest's table of files, so a version's objects never
change: the same key always means the same content. The manifest is one object, written last, and replacing
one object is atomic in S3. A reader takes the table from one manifest and its files from the version that
this manifest names: it sees the old folder or the new one, never half of one and never a mixture. A version
is an ordinary folder for every other S3 client.

The version before the current one stays, for readers that still hold its manifest; older ones are removed
when a new one is published, and so are uploads that were started and left alone for over a day. Several
readers may read while one writer publishes; two writers at one address are not coordinated.

A folder without `_manifest.json` was put there by somebody else: its files are the objects below the prefix,
and only their sizes and ETags can be checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spectraqlora.errors import InputError
from spectraqlora.files import BOOKKEEPING, names_fault
from spectraqlora.storage.address import Address
from spectraqlora.storage.connection import Connection, ObjectChanged, ObjectDamaged, ObjectMissing

MANIFEST = "_manifest.json"
SCHEMA_VERSION = 1
_VERSION_LENGTH = 16
VERSION_PREFIX = "_files-"
VERSION_FOLDER = re.compile(rf"{VERSION_PREFIX}([0-9a-f]{{{_VERSION_LENGTH}}})/")


class FileEntry(BaseModel):
    """One file: bytes, and SHA-256 in hex."""

    model_config = ConfigDict(extra="forbid")
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class FolderManifest(BaseModel):
    """The table of a published folder's files."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION
    version: str
    previous: str | None = None
    files: dict[str, FileEntry]

    @classmethod
    def of(cls, files: dict[str, FileEntry]) -> FolderManifest:
        return cls(version=_version(files), files=files)

    def folder(self, address: Address) -> Address:
        """Where this version's objects are."""
        return version_folder(address, self.version)


@dataclass(frozen=True)
class StoredFile:
    """One file of a folder, and the object that holds it.

    `identity` changes whenever the content does: SHA-256 where it is known, else the ETag.
    """

    name: str
    object: Address
    size: int
    sha256: str | None
    etag: str | None

    @property
    def identity(self) -> str:
        return f"sha256:{self.sha256}" if self.sha256 else f"etag:{self.etag}"


def _version(files: dict[str, FileEntry]) -> str:
    table = "".join(f"{name}\0{entry.size}\0{entry.sha256}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(table.encode()).hexdigest()[:_VERSION_LENGTH]


def version_folder(address: Address, version: str) -> Address:
    """Where the objects of a version are."""
    return address.child(VERSION_PREFIX + version)


def read_bytes(connection: Connection, address: Address, limit: int = 64 << 20) -> bytes:
    """A small object as a whole, of at most `limit` bytes.

    Raises:
        ObjectMissing: there is none.
        InputError: it is larger, or cannot be read.
    """
    file = find_file(connection, address)
    if file.size > limit:
        raise InputError("s3 address", address, f"an object of at most {limit} bytes; it has {file.size}")
    content = bytearray(file.size)

    def keep(offset: int, chunk: bytes) -> None:
        content[offset : offset + len(chunk)] = chunk

    connection.read_range(address, 0, file.size, keep, file.etag)
    return bytes(content)


def find_file(connection: Connection, address: Address) -> StoredFile:
    """One object's size, ETag and, where it was stored with one, SHA-256.

    A GET of one byte and not a HEAD: only a GET's refusal says what is wrong.
    """
    try:
        reply = connection.call("get_object", address, Key=address.key, Range="bytes=0-0")
        reply["Body"].close()
        size = int(reply.get("ContentRange", "0").rpartition("/")[2])
    except ObjectChanged:  # An empty object has no first byte.
        reply = connection.call("head_object", address, Key=address.key)
        size = int(reply["ContentLength"])
    if not reply.get("ETag"):
        raise InputError("s3 address", address, f"an S3 store; what answers at {connection.endpoint} is none")
    return StoredFile(
        name=address.key.rpartition("/")[2],
        object=address,
        size=size,
        sha256=stored_sha256(reply),
        etag=reply["ETag"].strip('"'),
    )


def stored_sha256(reply: dict[str, Any]) -> str | None:
    """The SHA-256 that an object was stored with; some stores change the case of the key."""
    metadata = {str(key).lower(): str(value) for key, value in reply.get("Metadata", {}).items()}
    return metadata.get("sha256")


def read_manifest(connection: Connection, address: Address) -> FolderManifest | None:
    """The manifest of a published folder; None where there is none.

    Raises:
        ObjectDamaged: a manifest that is malformed, cut short or changed by hand.
    """
    where = address.child(MANIFEST)
    try:
        text = read_bytes(connection, where)
    except ObjectMissing:
        return None
    try:
        manifest = FolderManifest.model_validate_json(text)
    except ValidationError as error:
        raise ObjectDamaged(
            "s3 manifest", where, f"a folder's manifest ({error.errors()[0]['msg']})"
        ) from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise ObjectDamaged("s3 manifest", where, f"schema version {SCHEMA_VERSION}")
    if manifest.version != _version(manifest.files):
        raise ObjectDamaged(
            "s3 manifest", where, "a table of files as it was published; this one was changed"
        )
    _check_names(manifest.files, where)
    return manifest


def _check_names(names: Iterable[str], where: Address) -> None:
    """Refuse names that a folder on disk cannot have, or must not (InputError); asked of every listing and manifest."""
    name, fault = names_fault(names)
    if fault:
        raise InputError("s3 object name", name, f"a name that stays inside its folder, at {where}; {fault}")


def objects_below(connection: Connection, address: Address) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object below an address, as (name relative to it, the listing's entry)."""
    token: dict[str, str] = {}
    while True:
        page = connection.call("list_objects_v2", address, Prefix=address.below, **token)
        for entry in page.get("Contents", []):
            name = entry["Key"][len(address.below) :]
            # Consoles store a folder as an empty object whose key ends with a slash.
            if name and not name.endswith("/"):
                yield name, entry
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def read_folder(connection: Connection, address: Address) -> tuple[str | None, list[StoredFile]]:
    """The current version (None for a folder that was not published by us) and its files, by name.

    Raises:
        InputError: nothing there, or only an upload that was never finished.
    """
    manifest = read_manifest(connection, address)
    if manifest is not None:
        folder = manifest.folder(address)
        return manifest.version, [
            StoredFile(name, folder.child(name), entry.size, entry.sha256, None)
            for name, entry in sorted(manifest.files.items())
        ]
    files, unfinished = [], False
    for name, entry in objects_below(connection, address):
        if VERSION_FOLDER.match(name):
            unfinished = True
        elif name.split("/")[0] != BOOKKEEPING:
            files.append(
                StoredFile(name, address.child(name), int(entry["Size"]), None, entry["ETag"].strip('"'))
            )
    if not files:
        expected = (
            f"a folder that was published as a whole; its upload has not finished (no {MANIFEST})"
            if unfinished
            else "a folder with objects in it; there are none"
        )
        raise InputError("s3 address", address, expected)
    _check_names((file.name for file in files), address)
    return None, sorted(files, key=lambda file: file.name)


def list_files(address: Address, connection: Connection | None = None) -> dict[str, int]:
    """Names and sizes in bytes of a folder's files.

    Raises:
        InputError: nothing there, an unfinished upload, or a store that refuses.
    """
    _, files = read_folder(connection or Connection(), address)
    return {file.name: file.size for file in files}


def exists(address: Address, connection: Connection | None = None) -> bool:
    """True where there is an object of this key, or a folder that can be read.

    Raises:
        InputError: a store or bucket that cannot be asked. A missing object is no error.
    """
    connection = connection or Connection()
    page = connection.call("list_objects_v2", address, Prefix=address.key, MaxKeys=1)
    entries = page.get("Contents", [])
    if not entries:
        return False
    if entries[0]["Key"] == address.key:
        return True
    if read_manifest(connection, address) is not None:
        return True
    return any(
        not VERSION_FOLDER.match(name) and name.split("/")[0] != BOOKKEEPING
        for name, _ in objects_below(connection, address)
    )


def content_digest(
    address: Address,
    connection: Connection | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> str:
    """What changes with the content of an object or folder; nothing but names and sizes is read.

    The version of a folder that was published by us, else a digest over names and SHA-256s or ETags, of the files whose
    names are `wanted`.

    Raises:
        InputError: nothing there, or a store that refuses.
    """
    connection = connection or Connection()
    file = single_file(connection, address)
    version, files = (None, [file]) if file is not None else read_folder(connection, address)
    if version is not None:
        return version
    files = [file for file in files if wanted(file.name)]
    lines = "".join(f"{file.name}\0{file.size}\0{file.identity}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def single_file(connection: Connection, address: Address) -> StoredFile | None:
    """The object of exactly this key; None where the address is a folder, or nothing."""
    if not address.key:
        return None
    try:
        return find_file(connection, address)
    except ObjectMissing:
        return None


def folders_below(address: Address, connection: Connection | None = None) -> dict[str, bool]:
    """Names of the folders right below an address, and whether each was published as a whole."""
    complete: dict[str, bool] = {}
    for name, _ in objects_below(connection or Connection(), address):
        folder, slash, rest = name.partition("/")
        if slash:
            complete[folder] = complete.get(folder, False) or rest == MANIFEST
    return complete


def remove_folder(address: Address, connection: Connection | None = None) -> None:
    """Remove everything below an address; the manifest goes first, so that nobody reads what is going.

    Raises:
        InputError: a store that refuses.
    """
    connection = connection or Connection()
    names = sorted(
        (name for name, _ in objects_below(connection, address)), key=lambda name: name != MANIFEST
    )
    for name in names:
        connection.call("delete_object", address, Key=address.child(name).key)
    for upload in open_uploads(connection, address, address.below):
        connection.call("abort_multipart_upload", address, Key=upload["Key"], UploadId=upload["UploadId"])


def open_uploads(connection: Connection, address: Address, prefix: str) -> list[dict[str, Any]]:
    """Uploads that were started and not completed, at most the first thousand."""
    try:
        page = connection.call("list_multipart_uploads", address, Prefix=prefix)
    except ObjectMissing:  # Some stores answer so where there are none.
        return []
    uploads: list[dict[str, Any]] = page.get("Uploads", [])
    return uploads


def check_writable(address: Address, connection: Connection | None = None) -> None:
    """Find out whether objects may be written below an address; nothing is left behind.

    Raises:
        InputError: no such bucket, no permission, or a store that refuses.
    """
    connection = connection or Connection()
    where = address.child(BOOKKEEPING)
    upload = connection.call("create_multipart_upload", where, Key=where.key)["UploadId"]
    connection.call("abort_multipart_upload", where, Key=where.key, UploadId=upload)
