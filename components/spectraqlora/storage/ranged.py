"""Reading parts of objects without a copy on disk."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from spectraqlora.errors import InputError
from spectraqlora.storage.address import Address
from spectraqlora.storage.connection import Connection
from spectraqlora.storage.folders import StoredFile, find_file, read_folder, single_file
from spectraqlora.storage.parallel import run_all

if TYPE_CHECKING:
    pass


class RangedReader:
    """Random access to one object; every read is of the object that was opened.

    A part of an object cannot be held against the SHA-256 of the whole: what is checked is that size and
    ETag stay the same.
    """

    def __init__(self, connection: Connection, file: StoredFile) -> None:
        self._connection, self._file = connection, file
        self.size = file.size

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes from an offset, fetched in parallel parts; memory: the result and at most workers x 1 MiB.

        Raises:
            InputError: a range outside the object, a changed object, or a store that refuses.
        """
        file, step = self._file, self._connection.part_bytes
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InputError("s3 object", file.object, f"{offset + length} bytes; it has {self.size}")
        content = bytearray(length)
        view = memoryview(content)

        def keep(position: int, chunk: bytes) -> None:
            start = position - offset
            view[start : start + len(chunk)] = chunk

        fetch = functools.partial(self._connection.read_range, file.object, sink=keep, etag=file.etag)
        jobs = [
            functools.partial(fetch, start, min(step, offset + length - start))
            for start in range(offset, offset + length, step)
        ]
        if len(jobs) == 1:
            jobs[0]()
        else:
            run_all(jobs, self._connection.workers)
        return content


def ranged_reader(address: Address, connection: Connection | None = None) -> RangedReader:
    """Open one object for reading at any offset.

    Raises:
        InputError: no such object, or a store that refuses.
    """
    connection = connection or Connection()
    return RangedReader(connection, find_file(connection, address))


def open_files(address: Address, connection: Connection | None = None) -> dict[str, RangedReader]:
    """Readers of a folder's files by name, or of the one object of this key.

    Raises:
        InputError: nothing there, an unfinished upload, or a store that refuses.
    """
    connection = connection or Connection()
    file = single_file(connection, address)
    files = [file] if file is not None else read_folder(connection, address)[1]
    return {file.name: RangedReader(connection, file) for file in files}
