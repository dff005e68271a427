"""Copies of models and data on this machine, kept in the user's cache as the hub's are."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spectraqlora.errors import InputError
from spectraqlora.runtime.cache import cache_folder
from spectraqlora.storage.address import Address
from spectraqlora.storage.connection import Connection, ObjectChanged
from spectraqlora.storage.download import download_file, download_folder
from spectraqlora.storage.folders import content_digest, single_file


def local_copy(
    address: Address,
    content: str = "",
    connection: Connection | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Path:
    """A file or folder of object storage on disk; what is there and unchanged is not fetched again.

    Args:
        address: of an object or a folder.
        content: what `content_digest` must say of it; empty takes what is there.
        connection: to the store.
        wanted: which of a folder's files count, by name; only they are fetched.

    Raises:
        ObjectChanged: the content is another one.
        InputError: nothing there, a damaged object, no room on the disk, or a store that refuses.
    """
    connection = connection or Connection()
    name = hashlib.sha256(f"{connection.endpoint} {address}".encode()).hexdigest()[:16]
    place = cache_folder() / "s3" / name
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("cache folder", place, f"a folder that can be written ({error.strerror})") from None
    with _alone(place / "lock"):
        file = single_file(connection, address)
        target = place / "folder" if file is None else place / "file" / file.name
        if file is None:
            download_folder(address, target, connection, wanted)
        else:
            download_file(address, target, connection)
    if content and content_digest(address, connection, wanted) != content:
        raise ObjectChanged(
            "s3 address", address, "the content that this run began with; it was replaced since"
        )
    return target


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
