"""Data sources: a file, a folder as people and the hub lay it out, a data set on the hub; their splits and rows.

A folder's files are the splits that its README's `configs` say, else what their names say: `train`, `validation`
(`valid`, `val`, `dev`, `eval`) and `test` as words in a file's or folder's name. Files without such a word are
trained on where none is called train. `datasets`' own folders (save_to_disk) are such folders, too.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import yaml

from spectraqlora.data.files import DataFile, Record, read_rows, suffixes
from spectraqlora.data.layouts import Layout, Layouts, check_label, known_columns
from spectraqlora.data.rows import Origin, Row, RowRefused
from spectraqlora.data.splits import Split
from spectraqlora.errors import InputError
from spectraqlora.places import COMPRESSED_SUFFIXES, DATA_SUFFIXES, Place, data_places, parted_contents
from spectraqlora.runtime.console import warn
from spectraqlora.settings import DataSettings
from spectraqlora.storage import open_files

_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "held_out": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
_SEPARATORS = re.compile(r"[-._ /]|\d+")
_DESCRIPTIONS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
}
_NO_DATA = ("readme", "license", "licence", "notice", "changelog", "contributing", "requirements", "citation")
_TEXT = (".txt", ".md")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
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
        return _arranged(str(place), opened, sizes, settings, single)
    if place.kind == "hub":
        return _hub_preview(place, settings)
    return _local_source(place.path, settings) if place.kind == "path" else None


def _local_source(path: Path, settings: DataSettings) -> Source:
    files = [path] if path.is_file() else sorted(_files_below(path))
    names = {(p.name if p == path else p.relative_to(path).as_posix()): p for p in files}
    opened = {name: functools.partial(open, p, "rb") for name, p in names.items()}
    sizes = {name: p.stat().st_size for name, p in names.items()}
    return _arranged(str(path), cast(Any, opened), sizes, settings, path.is_file())


def _files_below(folder: Path) -> Iterator[Path]:
    """Files at any depth, but hidden ones and those in hidden folders; links are followed."""
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where) / name for name in files if not name.startswith("."))


def _hub_source(place: Place, settings: DataSettings, content: str) -> Source:
    from huggingface_hub import HfApi, snapshot_download

    name, revision = place.with_owner(), content or place.revision
    try:
        names = HfApi().list_repo_files(name, revision=revision, repo_type="dataset")
        chosen = _hub_choice(place, name, revision, names, settings)
        read = ["README.md", *(glob.escape(file.name) for files in chosen.values() for file in files)]
        folder = Path(snapshot_download(name, revision=revision, repo_type="dataset", allow_patterns=read))
    except InputError:
        raise
    except Exception as error:  # The hub's client lets those of its HTTP library through.
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
    return _arranged(str(place), opened, dict.fromkeys(names, 1), settings, False, readme).splits


def _hub_preview(place: Place, settings: DataSettings) -> Source | None:
    """A hub data set whose files are read where they are, in parts."""
    from huggingface_hub import HfApi

    name = place.with_owner()
    try:
        names = HfApi().list_repo_files(name, repo_type="dataset")
    except Exception:  # It was asked for its commit before; what this machine has of it does.
        return None
    chosen = _hub_choice(place, name, place.revision, names, settings)
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
    try:
        return _ranged(_HubReader(name, file))
    except Exception as error:  # The hub's client lets those of its HTTP library through.
        raise _no_hub_data(place, error) from None


class _HubReader:
    """Parts of a file of a data set on the hub."""

    def __init__(self, name: str, file: str) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        self._url = hf_hub_url(name, file, repo_type="dataset")
        self.size = int(get_hf_file_metadata(self._url).size or 0)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from an offset."""
        from huggingface_hub import get_session
        from huggingface_hub.utils._headers import build_hf_headers

        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + length - 1}"}
        answer = get_session().get(self._url, headers=headers, follow_redirects=True)
        answer.raise_for_status()
        content = bytes(answer.content)
        # 206: a part, as asked for.
        return content if answer.status_code == 206 else content[offset : offset + length]


def _not_here(name: str) -> BinaryIO:
    raise InputError("data.source", name, "a file that was fetched")


def _no_hub_data(place: Place, error: Exception) -> InputError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError("data.source", place, f"a hub data set that loads ({first})")


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


def _arranged(
    source: str,
    opened: Mapping[str, Callable[[], BinaryIO]],
    sizes: Mapping[str, int],
    settings: DataSettings,
    single: bool,
    readme: str | None = None,
) -> Source:
    """Which of a source's files are which split.

    Args:
        source: its name, for errors.
        opened: what opens a file, by its name within the source.
        sizes: bytes by name.
        settings: the `data` section.
        single: whether the source is a file.
        readme: text of the README; None reads it where there is one.
    """
    names = sorted(opened) if single else _data_names(sorted(opened))
    if not single and (model := _model_folder(opened)) is not None:
        raise InputError(
            "data.source", source, f"data; {model or 'this'} is a model's folder, for model.base_model"
        )
    if not names or (single and not suffixes(names[0])[0]):
        kinds = ", ".join(DATA_SUFFIXES)
        expected = f"one of {kinds}, a folder or a hub id" if single else f"a folder with {kinds} files"
        raise InputError(
            "data.source", source, f"{expected}; compressed as {', '.join(COMPRESSED_SUFFIXES)} or not"
        )
    if readme is None:
        readme = ""
        if not single and "README.md" in opened:
            with opened["README.md"]() as stream:
                readme = stream.read().decode("utf-8", errors="replace")
    if single:
        _check_single(source, names[0], settings)
        chosen: dict[Split, list[str]] = {"train": names}
    else:
        configured = _configured(source, readme, names, settings)
        chosen = _splits(source, configured or {name: _split_name(name) for name in names}, settings)
    for split, of_split in chosen.items():
        _check_kinds(source, split, of_split)
        for name in of_split:
            if sizes[name] == 0:
                raise InputError("data.source", _full(source, name, single), "rows; the file is empty")
    files: dict[Split, list[DataFile]] = {
        split: [
            DataFile(_full(source, name, single), *suffixes(name), opened[name])
            if source_is_path(source)
            else DataFile(name, *suffixes(name), opened[name])
            for name in of_split
        ]
        for split, of_split in chosen.items()
    }
    read = {name for of_split in chosen.values() for name in of_split}
    return Source(files, [name for name in names if name not in read])


def _model_folder(names: Iterable[str]) -> str | None:
    """The folder among the files' in which a model is: a config, and weights or a tokenizer; None where there is none."""
    kinds: dict[str, set[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        if path.name in ("config.json", "adapter_config.json"):
            kinds.setdefault(str(path.parent), set()).add("config")
        elif path.name in ("tokenizer.json", "tokenizer_config.json") or path.suffix in _WEIGHTS:
            kinds.setdefault(str(path.parent), set()).add("model")
    found = next((folder for folder, kind in kinds.items() if len(kind) == 2), None)
    return "" if found == "." else found


def _check_single(source: str, name: str, settings: DataSettings) -> None:
    """Refuse settings that choose among splits and subsets, where there is one file (InputError)."""
    own = _split_name(name).rpartition("/")[2]
    known = {"train", own, _word(own) or "train"}
    if not set(settings.split.split("+")) <= known:
        raise InputError(
            "data.split", settings.split, f"train: {source} is one file, and that is its only split"
        )
    if settings.subset:
        raise InputError("data.subset", settings.subset, f"nothing: {source} is one file, and has no subsets")


def source_is_path(source: str) -> bool:
    """Whether a source's name is a path of this machine."""
    return os.path.exists(source)


def _full(source: str, name: str, single: bool) -> str:
    if single:
        return source
    return f"{source}/{name}" if source_is_path(source) else name


def _data_names(names: list[str]) -> list[str]:
    """Those that hold rows; texts only where nothing else does."""
    data = []
    for name in names:
        last = PurePosixPath(name).name.lower()
        kind = suffixes(name)[0]
        if not kind or last in _DESCRIPTIONS or (kind in _TEXT and last.startswith(_NO_DATA)):
            continue
        # `datasets` keeps what it computed next to the rows.
        if not (last.startswith("cache-") and last.endswith(".arrow")):
            data.append(name)
    structured = [name for name in data if suffixes(name)[0] not in _TEXT]
    return structured or data


def _split_name(name: str) -> str:
    """The name of a file's split as `datasets` writes it: the file's without its shard, or its folder's."""
    path = PurePosixPath(name)
    kind, compression = suffixes(name)
    stem = path.name[: len(path.name) - len(kind) - len(compression)]
    base = _SHARD.sub("", stem)
    # save_to_disk calls every file data, in a folder per split.
    if base == "data" and len(path.parts) > 1:
        return path.parts[-2]
    return "/".join([*path.parts[:-1], base])


def _is_named(name: str) -> bool:
    """Whether a file's name has the form in which `datasets` and the hub write a split's name."""
    return _SHARD.search(PurePosixPath(name).name.partition(".")[0]) is not None


def _word(split: str) -> Split | None:
    """Which split a name says: by its last part that says one."""
    for part in reversed(split.lower().split("/")):
        words = set(_SEPARATORS.split(part))
        for kind, known in _WORDS.items():
            if words & set(known):
                return kind
    return None


def _splits(source: str, split_of: Mapping[str, str], settings: DataSettings) -> dict[Split, list[str]]:
    """Names by split, of the files' own split names."""
    wanted = settings.split.split("+")
    last = {name: split.rpartition("/")[2] for name, split in split_of.items()}
    train = [name for name in split_of if last[name] in wanted]
    if not train and settings.split == "train":
        train = [name for name, split in split_of.items() if _word(split) == "train"] or [
            name for name, split in split_of.items() if _word(split) is None
        ]
        named = sorted({last[name] for name in train if _is_named(name)})
        if len(named) > 1:
            raise InputError("data.split", "train", f"one of the splits {', '.join(named)}")
    if not train:
        known = ", ".join(sorted(set(last.values())))
        if settings.split == "train":
            raise InputError("data.source", source, f"a file to train on, or the path of one; it has {known}")
        slices = "; data.max_rows takes part of one" if "[" in settings.split else ""
        raise InputError("data.split", settings.split, f"one of the splits {known}{slices}")
    chosen: dict[Split, list[str]] = {"train": train}
    others: tuple[Split, ...] = ("held_out", "test")
    parts = {_without_word(last[name]) for name in train}
    for kind in others:
        names = [name for name, split in split_of.items() if _word(split) == kind and name not in train]
        # To train_sft belongs test_sft, where there is one.
        names = [name for name in names if _without_word(last[name]) in parts] or names
        if names:
            chosen[kind] = names
    return chosen


def _without_word(split: str) -> str:
    """A split's name without the word that says which it is, and without numbers."""
    words = {word for known in _WORDS.values() for word in known}
    return " ".join(part for part in _SEPARATORS.split(split.lower()) if part and part not in words)


def _configured(source: str, readme: str, names: list[str], settings: DataSettings) -> dict[str, str]:
    """A split by file name as the README's `configs` say; empty where it says nothing.

    Patterns that no file has, and a head that is no YAML, are told: the rows may not be those that its author meant.

    Raises:
        InputError: several configs, and `data.subset` names none of them; or one without a file.
    """
    head = re.match(r"---\s*\n(.*?)\n---", readme, re.DOTALL)
    try:
        card = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        warn(f"{source}: its README's head is no YAML; splits are what files are called")
        card = None
    configs = card.get("configs") if isinstance(card, dict) else None
    configs = [c for c in configs or [] if isinstance(c, dict) and c.get("data_files")]
    if not configs:
        if settings.subset not in ("", None, "default"):
            raise InputError("data.subset", settings.subset, f"nothing: no README of {source} names subsets")
        return {}
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    marked = [name for name, config in by_name.items() if config.get("default")]
    only = [*marked, *(["default"] if "default" in by_name else []), *(by_name if len(by_name) == 1 else ())]
    name = settings.subset or (only[0] if only else "")
    if name not in by_name:
        raise InputError("data.subset", name, f"one of the subsets of {source}: {', '.join(by_name)}")
    found: dict[str, str] = {}
    lost: list[str] = []
    for split, pattern, matched in _matches(by_name[name], names):
        found |= dict.fromkeys(matched, split)
        lost += [] if matched else [f"{split}: {pattern}"]
    if settings.subset and not found:
        raise InputError("data.subset", name, f"a subset with files; {source} has none as {', '.join(lost)}")
    if lost:
        instead = "" if found else "; splits are what files are called"
        warn(f"{source}: no file is what its README names as {', '.join(lost)}{instead}")
    return found


def _matches(config: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Split, pattern and the files that have it, of everything that a config names."""
    files, folder = config["data_files"], str(config.get("data_dir") or "").strip("/")
    entries = files if isinstance(files, list) else [files]
    for entry in entries:
        split = str(entry.get("split", "train")) if isinstance(entry, dict) else "train"
        paths = entry.get("path") if isinstance(entry, dict) else entry
        for pattern in paths if isinstance(paths, list) else [paths]:
            full = f"{folder}/{pattern}" if folder else str(pattern)
            full = full.removeprefix("./").replace("**/", "*")
            # A file with brackets in its name may be meant as it is.
            yield split, full, [full] if full in names else fnmatch.filter(names, full)


def _check_kinds(source: str, split: Split, names: list[str]) -> None:
    kinds = {suffixes(name)[0] for name in names}
    same = {".ndjson": ".jsonl", ".tsv": ".csv"}
    if len({same.get(kind, kind) for kind in kinds}) > 1:
        raise InputError(
            "data.source", source, f"a folder with files of one kind; it has {', '.join(sorted(kinds))}"
        )
