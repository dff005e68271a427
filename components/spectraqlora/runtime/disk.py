"""Room on the disk: asked for before something large is written, and said in one line where it ran out."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from spectraqlora.errors import InputError

_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WORDS = ("No space left on device", "os error 28", "disk is full", "Disk quota exceeded", "File too large")
"""What libraries make of these numbers: safetensors and Arrow keep the text alone, SQLite has its own."""
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def shown(size: float) -> str:
    """A number of bytes for people, such as 14.9 GiB."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def free_bytes(folder: Path) -> int:
    """What may still be written below a folder, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def ask(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin with what does not fit.

    Args:
        folder: where it would be written.
        needed: bytes.
        what: it is, such as "the merged model".

    Raises:
        InputError: less is free there.
    """
    if needed > (free := free_bytes(folder)):
        raise InputError("disk", folder, f"{shown(needed)} free for {what}; there are {shown(free)}")


def full(error: BaseException, folders: Iterable[Path] = ()) -> InputError | None:
    """The line for an error that says, itself or by its causes, that a disk is full or a quota used up; else None.

    Args:
        error: whatever was raised.
        folders: where was written; where the error names no file, the one with the least room is shown.
    """
    for cause in _causes(error):
        number = getattr(cause, "errno", None)
        if number in _NUMBERS or any(words in str(cause) for words in _WORDS):
            named = getattr(cause, "filename", None)
            places = [Path(str(named))] if named else [*folders, Path(tempfile.gettempdir())]
            place = min(places, key=free_bytes)
            limit = ", or a limit of files' size" if number == errno.EFBIG else ""
            return InputError("disk", place, f"free space{limit}: {shown(free_bytes(place))} are left")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
