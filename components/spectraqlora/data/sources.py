"""Data sources: a file, a folder, an address, a data set on the hub; their rows, read where they are or fetched."""

from __future__ import annotations

import functools
import glob
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from spectraqlora.data.files import DataFile, Record, read_rows
from spectraqlora.data.folders import arranged
from spectraqlora.data.layouts import Layout, Layouts, check_label, known_columns
from spectraqlora.data.rows import Origin, Row, RowRefused
from spectraqlora.data.splits import Split
from spectraqlora.errors import InputError
from spectraqlora.places import HubAway, Place, data_places, parted_contents
from spectraqlora.settings import DataSettings
from spectraqlora.storage import open_files

_NATIVE = (".parquet", ".arrow")


@dataclass(frozen=True)
class Source:
    """What is read of a data source.

    Args:
        splits: files by split; only those that there are.
        unused: names of data files that are not read.
    """

    splits: Mapping[Split, list[DataFile]]
    unused: list[str] = field(default_factory=list)

    def records(self, settings: DataSettings, split: Split) -> Iterator[tuple[Origin, Record, Layout]]:
        """Every row of a split as its file has it, with its layout.

        Raises:
            InputError: a file that cannot be read, or columns that fit no layout.
        """
        for file in self.splits.get(split, []):
            layouts = Layouts(settings, file.name, file.suffix in _NATIVE)
            for number, record in read_rows(file, settings.encoding, known_columns(settings)):
                origin = Origin(file.name, number, file.source)
                layout = layouts.of(record)
                check_label(record, layout, settings, origin)
                yield origin, record, layout

    def rows(self, settings: DataSettings, split: Split) -> Iterator[Row | tuple[Origin, RowRefused]]:
        """Every row of a split, or where it is from and why there is nothing to learn from.

        Raises:
            InputError: as `records`, or a value that is no text, plain number or list of messages.
        """
        for origin, record, layout in self.records(settings, split):
            try:
                yield layout.row(record, origin)
            except RowRefused as refused:
                yield origin, refused


def open_source(place: Place, settings: DataSettings, content: str = "") -> Source:
    """The source's files on this machine; those of an address or of the hub are fetched, as far as they are read.

    Args:
        place: of the data.
        settings: the `data` section.
        content: what an s3:// address must hold, or the commit of a hub id; empty takes what is there.

    Raises:
        InputError: the source is missing, empty, changed since, or has no file to train on.
    """
    if place.kind == "hub":
        return _hub_source(place, settings, content)
    return _local_source(place.local_copy(content), settings)


def open_sources(settings: DataSettings, content: str = "") -> Source:
    """The files of all sources as those of one, on this machine.

    Args:
        settings: the `data` section.
        content: what each of them must hold, as `joined_contents` says it; empty takes what is there.

    Raises:
        InputError: as `open_source`.
    """
    places = data_places(settings)
    contents = parted_contents(content, len(places))
    return _together(
        [
            open_source(place, _of_part(settings, place, part.split), known)
            for place, part, known in zip(places, settings.parts, contents, strict=True)
        ]
    )


def look_at_sources(places: Sequence[Place], settings: DataSettings) -> Source | None:
    """The files of all sources where they are, as `open_remotely` has them; None where one of them cannot be seen.

    Args:
        places: of the sources.
        settings: the `data` section.

    Raises:
        InputError: as `open_source`.
    """
    opened = [
        open_remotely(place, _of_part(settings, place, part.split))
        for place, part in zip(places, settings.parts, strict=True)
    ]
    seen = [source for source in opened if source is not None]
    return _together(seen) if len(seen) == len(opened) else None


def _of_part(settings: DataSettings, place: Place, split: str) -> DataSettings:
    """The section for one source; among several, `data.subset` is of those that can have subsets, a file cannot."""
    among_others = len(settings.parts) > 1 and place.kind == "path" and place.path.is_file()
    return settings.model_copy(update={"split": split, **({"subset": ""} if among_others else {})})


def _together(sources: list[Source]) -> Source:
    splits: dict[Split, list[DataFile]] = {}
    for number, source in enumerate(sources):
        for split, files in source.splits.items():
            splits.setdefault(split, []).extend(replace(file, source=number) for file in files)
    return Source(splits, [name for source in sources for name in source.unused])


def open_remotely(place: Place, settings: DataSettings) -> Source | None:
    """The source's files where they are, for a look at their first rows.

    Returns:
        None where nothing of it can be seen without fetching all of it.

    Raises:
        InputError: as `open_source`.
    """
    if place.kind == "s3":
        readers = open_files(place.address)
        opened = {name: functools.partial(_ranged, reader) for name, reader in readers.items()}
        sizes = {name: reader.size for name, reader in readers.items()}
        single = len(readers) == 1 and next(iter(readers)) == place.text.rstrip("/").rpartition("/")[2]
        return Source(*arranged(str(place), opened, sizes, settings, single))
    if place.kind == "hub":
        return _hub_preview(place, settings)
    return _local_source(place.path, settings) if place.kind == "path" else None


def _local_source(path: Path, settings: DataSettings) -> Source:
    files = [path] if path.is_file() else sorted(_files_below(path))
    names = {(p.name if p == path else p.relative_to(path).as_posix()): p for p in files}
    opened = {name: functools.partial(open, p, "rb") for name, p in names.items()}
    sizes = {name: p.stat().st_size for name, p in names.items()}
    return Source(*arranged(str(path), cast(Any, opened), sizes, settings, path.is_file()))


def _files_below(folder: Path) -> Iterator[Path]:
    """Files at any depth, but hidden ones and those in hidden folders; links are followed."""
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where) / name for name in files if not name.startswith("."))


def _hub_source(place: Place, settings: DataSettings, content: str) -> Source:
    from huggingface_hub import HfApi, snapshot_download

    from spectraqlora.hub import limit_requests

    limit_requests()
    revision = content or place.revision
    try:
        place.digest()  # One request that is not tried again says whether the hub answers.
        name = place.with_owner()
        names = HfApi().list_repo_files(name, revision=revision, repo_type="dataset")
        chosen = _hub_choice(place, name, revision, names, settings)
        read = ["README.md", *(glob.escape(file.name) for files in chosen.values() for file in files)]
        folder = Path(snapshot_download(name, revision=revision, repo_type="dataset", allow_patterns=read))
    except Exception as error:  # The hub's client lets those of its HTTP library through.
        if isinstance(error, InputError) and not isinstance(error, HubAway):
            raise
        cached = place.partial_copy(content)
        if cached is None:
            raise _no_hub_data(place, error) from None
        folder = cached
    return _local_source(folder, settings)


def _hub_choice(
    place: Place, name: str, revision: str, names: list[str], settings: DataSettings
) -> Mapping[Split, list[DataFile]]:
    from huggingface_hub import hf_hub_download

    readme = ""
    if "README.md" in names:
        path = hf_hub_download(name, "README.md", revision=revision, repo_type="dataset")
        readme = Path(path).read_text(encoding="utf-8", errors="replace")
    opened = {file: cast(Any, functools.partial(_not_here, file)) for file in names}
    return arranged(str(place), opened, dict.fromkeys(names, 1), settings, False, readme)[0]


def _hub_preview(place: Place, settings: DataSettings) -> Source | None:
    """A hub data set whose files are read where they are, in parts."""
    from huggingface_hub import HfApi

    try:
        place.digest()
        name = place.with_owner()
        names = HfApi().list_repo_files(name, repo_type="dataset")
    except Exception as error:  # What this machine has of it does.
        if place.partial_copy() is None:
            raise _no_hub_data(place, error) from None
        return None
    try:
        chosen = _hub_choice(place, name, place.revision, names, settings)
    except InputError:
        raise
    except Exception as error:
        raise _no_hub_data(place, error) from None
    return Source(
        {
            split: [
                DataFile(
                    file.name,
                    file.suffix,
                    file.compression,
                    functools.partial(_open_on_hub, place, name, file.name),
                )
                for file in files
            ]
            for split, files in chosen.items()
        }
    )


def _open_on_hub(place: Place, name: str, file: str) -> BinaryIO:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    from spectraqlora.hub import HubFile, limit_requests

    limit_requests()
    url = hf_hub_url(name, file, repo_type="dataset")
    try:
        size = int(get_hf_file_metadata(url).size or 0)
    except Exception as error:  # The hub's client lets those of its HTTP library through.
        raise _no_hub_data(place, error) from None
    return _ranged(HubFile(url, size, functools.partial(_no_hub_data, place)))


def _not_here(name: str) -> BinaryIO:
    raise InputError("data.source", name, "a file that was fetched")


def _no_hub_data(place: Place, error: Exception) -> InputError:
    from spectraqlora.hub import refusal

    if isinstance(error, InputError):
        return error
    return refusal("data.source", place, "a hub data set that loads", error)


class _Ranged(io.RawIOBase):
    """An object of a store as a file."""

    def __init__(self, reader: Any) -> None:
        self._reader, self._at = reader, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._reader.size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._reader.size - self._at))
        buffer[:length] = self._reader.read(self._at, length) if length else b""
        self._at += length
        return length


def _ranged(reader: Any) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Ranged(reader), 1 << 20))
