"""Which of a source's files are which split.

Its README's `configs` say so, else names do: `train`, `validation` (`valid`, `val`, `dev`, `eval`) and `test` as words
in a file's or folder's name. Files without such a word are trained on where none is called train. `datasets`' own
folders (save_to_disk) are such folders, too.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import yaml

from spectraqlora.data.files import DataFile, suffixes
from spectraqlora.data.splits import Split
from spectraqlora.errors import InputError
from spectraqlora.places import COMPRESSED_SUFFIXES, DATA_SUFFIXES
from spectraqlora.runtime.console import warn
from spectraqlora.settings import DataSettings

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


def arranged(
    source: str,
    opened: Mapping[str, Callable[[], BinaryIO]],
    sizes: Mapping[str, int],
    settings: DataSettings,
    single: bool,
    readme: str | None = None,
) -> tuple[dict[Split, list[DataFile]], list[str]]:
    """Which of a source's files are which split.

    Args:
        source: its name, for errors.
        opened: what opens a file, by its name within the source.
        sizes: bytes by name.
        settings: the `data` section.
        single: whether the source is a file.
        readme: text of the README; None reads it where there is one.

    Returns:
        (files by split, names of data files that are not read)

    Raises:
        InputError: there is no file to train on, or settings name what is not there.
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
            if _is_path(source)
            else DataFile(name, *suffixes(name), opened[name])
            for name in of_split
        ]
        for split, of_split in chosen.items()
    }
    read = {name for of_split in chosen.values() for name in of_split}
    return files, [name for name in names if name not in read]


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


def _is_path(source: str) -> bool:
    """Whether a source's name is a path of this machine."""
    return os.path.exists(source)


def _full(source: str, name: str, single: bool) -> str:
    if single:
        return source
    return f"{source}/{name}" if _is_path(source) else name


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
