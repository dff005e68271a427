"""What a base model or a data source is: decided once, where its name comes in.

| a name | is |
| --- | --- |
| `sample` | the offline sample |
| `s3://bucket/prefix` | an address in object storage |
| anything that exists on this machine | a path |
| `name` or `owner/name`, without a file's suffix | a hub id |
| all else | a path that does not exist, and is refused |

A folder that is called like a hub id, or `sample`, is meant by `./name`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectraqlora.errors import InputError, NoAnswer
from spectraqlora.files import file_digest, folder_digest, name_fault
from spectraqlora.runtime.disk import full
from spectraqlora.settings import DataSettings

if TYPE_CHECKING:
    from spectraqlora.storage import Address

Kind = Literal["sample", "hub", "path", "s3"]
SAMPLE = "sample"
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", ".arrow")
"""Kinds of data files; those of text may be compressed."""
COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
DESCRIPTION_FILES = (
    *("config.json", "generation_config.json", ADAPTER_CONFIG, INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
"""Configs, tokenizer and chat templates: what a base model is loaded from besides its weights, by patterns."""
_VOCABULARIES = (".json", ".codes", ".tokenizer", "dict.txt")
"""How the names of further files end that tokenizers of some families are made of."""
MODEL_FILES = ("*.safetensors", *DESCRIPTION_FILES)
"""What is fetched of a base model."""

_FILE_SUFFIXES = {*DATA_SUFFIXES, *COMPRESSED_SUFFIXES, ".safetensors", ".bin", ".gguf"}
_HUB_ID = re.compile(r"(?!.*(--|\.\.|[.-]$|[.-]/))(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""As the hub has them: at most 96 characters, no two of - or . after each other, none at an end."""
_HUB_TIMEOUT_S = 10.0
_EXPECTED = {
    "model": "an existing folder; a hub id is a name such as gpt2 or owner/name, an address begins with s3://",
    "data": "an existing file or folder; a hub id is a name such as imdb or owner/name, an address begins with "
    "s3://",
    "file": "an existing file; an address begins with s3://",
}


def kind_of(name: str) -> Kind:
    """What a name is, by its form and by what this machine has; a path need not exist."""
    if name == SAMPLE:
        return "sample"
    if name.startswith("s3://"):
        return "s3"
    hub_like = _HUB_ID.fullmatch(name) and Path(name.lower()).suffix not in _FILE_SUFFIXES
    return "hub" if hub_like and not os.path.exists(name) else "path"


class HubAway(InputError):
    """A hub that does not answer, or not as one, or refuses: what this machine has of it serves."""


class HubSilent(HubAway, NoAnswer):
    """A hub that may answer another time."""


_UNKNOWN = "-"
"""Stands for the content of a source among several that is not known."""


@dataclass(frozen=True)
class Place:
    """Where a base model, a data set or a file is.

    Args:
        text: a hub id, an address, an absolute path, or `sample`: the same from any folder of this machine.
        kind: what it is.
        holds: a base model (a folder), data (a file or folder), or one file.
        field: the setting that named it.
        revision: of a base model on the hub: branch, tag or commit.
        trusted: whether the base model's own code may be fetched, and counts.
    """

    text: str
    kind: Kind
    holds: Literal["model", "data", "file"]
    field: str
    revision: str = "main"
    trusted: bool = False

    def __str__(self) -> str:
        return self.text

    @property
    def path(self) -> Path:
        """The path of a place of kind `path`."""
        assert self.kind == "path", self
        return Path(self.text)

    @property
    def address(self) -> Address:
        """The address of a place of kind `s3`."""
        from spectraqlora.storage import parse_address

        assert self.kind == "s3", self
        return parse_address(self.text, self.field)

    def digest(self, offline: bool = False) -> str:
        """What identifies the content: SHA-256 of the files, versions or ETags of the objects, the hub's commit.

        Of a base model only the files count that it is loaded from.

        Args:
            offline: of a hub id whose hub does not answer, take the commit of this machine's newest copy, where
                it has one.

        Raises:
            InputError: nothing there, a store or hub that refuses or does not answer.
        """
        if self.kind == "hub":
            try:
                return str(self._ask().sha)
            except HubAway:
                if offline and (commit := self._cached_commit()):
                    return commit
                raise
        if self.kind == "s3":
            from spectraqlora import storage

            return storage.content_digest(self.address, wanted=self._counts)
        if self.holds == "model":
            return base_digest(self.local_copy(), self.trusted)
        path = self.local_copy()
        return file_digest(path) if path.is_file() else folder_digest(path)

    def local_copy(self, content: str = "") -> Path:
        """The file or folder itself, or a copy of it in the user's cache.

        Args:
            content: what `digest` must still say of an address, and the commit to fetch from the hub; empty
                takes what is there. Paths are taken as they are.

        Raises:
            InputError: nothing there, another content, a store or hub that refuses or does not answer; or it is
                the sample, which is made on the user's machine alone, or data on the hub, which `datasets` fetches.
        """
        if self.kind == "path":
            return self.path
        if self.kind == "s3":
            from spectraqlora import storage

            return storage.local_copy(self.address, content, wanted=self._counts)
        if self.kind == "sample" or self.holds == "data":
            raise InputError(
                self.field, self.text, f"{_EXPECTED[self.holds]}; of this there is no local copy"
            )
        return self._snapshot(content)

    def description(self, folder: Path, content: str = "") -> tuple[Path, list[str]]:
        """What describes a base model on the hub or at an address, without its weights, and all its files' names.

        Args:
            folder: where to put it; what the hub has is kept in the hub's own cache instead.
            content: the hub's commit; empty takes the place's revision.

        Returns:
            The folder that it is in, and the names.

        Raises:
            InputError: nothing there, or a store or hub that refuses or does not answer.
        """
        if self.kind == "s3":
            from spectraqlora import storage

            names = list(storage.list_files(self.address))
            storage.download_folder(self.address, folder, wanted=lambda name: _describes(name, self.trusted))
            return folder, names
        folder = self.hub_description(content)
        return folder, [file.rfilename for file in self._ask(content).siblings or ()]

    def hub_description(self, content: str = "") -> Path:
        """What describes a base model on the hub, in the hub's own cache; where it is there, nothing is asked.

        Args:
            content: the hub's commit; empty takes the place's revision.

        Raises:
            InputError: the hub has none, or does not answer.
        """
        from spectraqlora.hub import without_bars

        with without_bars():
            return self._fetched([*DESCRIPTION_FILES, *(["*.py"] if self.trusted else [])], content)

    def cached_copy(self, content: str = "") -> Path | None:
        """The complete copy of a hub's model in the hub's cache; None where there is none. Nothing is asked of the hub."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(
                snapshot_download(self.text, revision=content or self.revision, local_files_only=True)
            )
            base_digest(folder, self.trusted)
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError, InputError):
            return None
        return folder

    def card(self) -> dict[str, Any]:
        """What the card of a hub id says in its front matter, such as the license.

        Raises:
            InputError: the hub has no such thing, or does not answer.
        """
        found = self._ask().card_data
        return dict(found.to_dict()) if found is not None else {}

    def with_owner(self) -> str:
        """A hub id with its owner, without which the hub's oldest ones are known too: of imdb, stanfordnlp/imdb.

        Where the hub does not answer, the id as it is.

        Raises:
            InputError: the hub has none of this name.
        """
        if "/" in self.text:
            return self.text
        try:
            return str(self._ask().id)
        except HubAway:
            return self.text

    def _snapshot(self, commit: str) -> Path:
        return self._fetched(_model_files(self.trusted), commit)

    def _fetched(self, patterns: list[str], commit: str = "") -> Path:
        from huggingface_hub import snapshot_download

        from spectraqlora.hub import limit_requests

        limit_requests()
        try:
            return Path(
                snapshot_download(self.text, revision=commit or self.revision, allow_patterns=patterns)
            )
        except Exception as error:  # The hub's client lets those of its HTTP library through.
            if full(error) or getattr(error, "filename", None):  # Not the hub's fault, but the cache's.
                raise
            raise self._away(error) from None

    def _ask(self, commit: str = "") -> Any:
        """What the hub says of a hub id, at a commit or at the place's revision.

        Raises:
            HubAway: it does not answer.
            InputError: it has no such model or data set, or no such revision of it.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        from spectraqlora.hub import COMMIT, limit_requests

        limit_requests()
        ask = HfApi().model_info if self.holds == "model" else HfApi().dataset_info
        try:
            found = ask(self.text, revision=commit or self.revision, timeout=_HUB_TIMEOUT_S)
            if not COMMIT.fullmatch(str(found.sha)):
                raise ValueError(f"its answer names the commit {found.sha!r}")
            return found
        except RevisionNotFoundError:
            expected = f"a {self._hub_kind} with a revision {self.revision!r}; the hub has none"
            raise InputError(self.field, self.text, expected) from None
        except RepositoryNotFoundError:
            expected = f"a hub {self._hub_kind} that exists and that you, or HF_TOKEN, may read; or a path"
            raise InputError(self.field, self.text, expected) from None
        except Exception as error:  # The hub's client lets those of its HTTP library through.
            raise self._away(error) from None

    def partial_copy(self, commit: str = "") -> Path | None:
        """What this machine has of a hub id, be it complete or not; None where it has nothing.

        Args:
            commit: which one; the newest where it is empty.
        """
        commit = commit or self._cached_commit()
        folder = self._copies() / "snapshots" / commit
        return folder if commit and folder.is_dir() else None

    def _copies(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        kind = "model" if self.holds == "model" else "dataset"
        return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=self.text, repo_type=kind)

    def _cached_commit(self) -> str:
        copies = self._copies()
        if (copies / "snapshots" / self.revision).is_dir():
            return self.revision
        reference = copies / "refs" / self.revision
        if reference.is_file():
            return reference.read_text(encoding="utf-8").strip()
        # What was fetched by its commit alone has no reference.
        commits = sorted((copies / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        return commits[-1].name if commits and self.revision == "main" else ""

    def _counts(self, name: str) -> bool:
        """Whether a file of the place is part of what it is for: of a base model, what it is loaded from."""
        if self.holds != "model":
            return True
        return _describes(name, self.trusted) or (name.endswith(".safetensors") and "/" not in name)

    @property
    def _hub_kind(self) -> str:
        return "model" if self.holds == "model" else "data set"

    def _away(self, error: Exception) -> HubAway:
        from spectraqlora.hub import explained, silent

        local = "a folder" if self.holds == "model" else "an existing file or folder"
        expected = explained(f"{local} or a reachable hub {self._hub_kind}", error)
        return (HubSilent if silent(error) else HubAway)(self.field, self.text, expected)


def base_place(
    name: str, revision: str = "main", trusted: bool = False, field: str = "model.base_model"
) -> Place:
    """The place of a base model.

    Args:
        name: hub id, folder, s3:// address, or `sample`.
        revision: of the hub: branch, tag or commit.
        trusted: whether the model's own code may be fetched, and counts.
        field: the setting or argument that named it.

    Raises:
        InputError: a malformed address, a path that does not exist, or a file.
    """
    place = Place(_normal(name), kind_of(name), "model", field, revision, trusted)
    _check(place, name)
    if place.kind == "path" and not place.path.is_dir():
        raise InputError(field, name, "a folder with the model's files; this is a file")
    return place


def data_place(name: str, field: str = "data.source") -> Place:
    """The place of a data set: hub id, file, folder, s3:// address, or `sample`.

    Raises:
        InputError: a malformed address, or a path that does not exist.
    """
    place = Place(_normal(name), kind_of(name), "data", field)
    _check(place, name)
    return place


def data_places(settings: DataSettings, field: str = "data.source") -> list[Place]:
    """The places of all data sources, in order.

    Raises:
        InputError: as `data_place`.
    """
    if not settings.sources:
        return [data_place(settings.source, field)]
    return [
        data_place(part.source, f"data.sources[{number}]") for number, part in enumerate(settings.sources)
    ]


def joined_contents(contents: Sequence[str]) -> str:
    """What several sources hold as one text; that of one source is its own.

    Args:
        contents: as `Place.digest` says it, of each source; empty where it is not known.
    """
    return contents[0] if len(contents) == 1 else " ".join(content or _UNKNOWN for content in contents)


def parted_contents(content: str, count: int) -> list[str]:
    """What each of `count` sources holds, of what `joined_contents` made; empty where it is not known."""
    parts = content.split(" ") if count > 1 else [content]
    known = ["" if part == _UNKNOWN else part for part in parts]
    return known if len(known) == count else [""] * count


def file_place(name: str, field: str) -> Place:
    """The place of one file, at a path or an s3:// address.

    Raises:
        InputError: a malformed address, a path that does not exist, or a folder.
    """
    place = Place(_normal(name), "s3" if kind_of(name) == "s3" else "path", "file", field)
    _check(place, name)
    if place.kind == "path" and not place.path.is_file():
        raise InputError(field, name, _EXPECTED["file"])
    return place


def base_digest(folder: Path, trusted: bool = False) -> str:
    """SHA-256 over names and contents of what a base model is loaded from, in hex.

    Other files beside them do not count: notes, cards, results, weights in forms that are not read.

    Raises:
        InputError: there is nothing of it in the folder, or an index that names what is not there.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    described = [name for name in names if _describes(name, trusted)]
    index = folder / INDEX
    text = index.read_text(encoding="utf-8", errors="replace") if INDEX in described else None
    weights, _ = (
        weight_files(names, text, folder) if any(n.endswith(".safetensors") for n in names) else ([], {})
    )
    if weights == [WEIGHTS]:
        described = [name for name in described if name != INDEX]
    return folder_digest(folder, [escape(name) for name in {*described, *weights}])


def check_links(folder: Path, place: object = None) -> None:
    """Refuse configs, tokenizers and templates that are links out of a model's folder: exports would hold what they lead to.

    The hub's cache, whose files are links to its own blobs, is as a folder of files.

    Raises:
        InputError: naming the first such link.
    """
    root = folder.resolve()
    homes = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/*")):
        real = (folder / name).resolve()
        read = _describes(name, True) or ("/" not in name and name.endswith(_VOCABULARIES))
        if read and not any(real.is_relative_to(home) for home in homes):
            raise InputError(
                "model.base_model", f"{place or folder}/{name}", f"a file, and no link out of its folder, to {real}"
            )  # fmt: skip


def weight_files(
    names: Collection[str], index: str | None, where: object
) -> tuple[list[str], dict[str, str]]:
    """The safetensors files that a base model is loaded from, and the file of each tensor that an index names.

    As transformers does it, `model.safetensors` comes before an index. Where there is neither, all safetensors
    right in the folder, but those of an adapter.

    Args:
        names: of the folder's files, relative to it.
        index: text of `model.safetensors.index.json`; None where there is none.
        where: the folder, as messages name it.

    Raises:
        InputError: there are none, or the index is malformed, or names a file outside the folder or a missing one.
    """
    if WEIGHTS in names:
        return [WEIGHTS], {}
    if index is None:
        top = [name for name in names if name.endswith(".safetensors") and "/" not in name]
        if files := sorted(name for name in top if name != "adapter_model.safetensors"):
            return files, {}
        raise InputError("model.base_model", where, "a model folder; it has no *.safetensors weights")
    here = f"{where}/{INDEX}"
    weight_map = read_document(index, here, "model index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("model index", here, "a JSON document with a weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or name_fault(file):
            raise InputError(
                "model index", here, f"names of safetensors files inside the folder, and not {file!r}"
            )
    files = sorted(set(weight_map.values()))
    for file in files:
        if file not in names:
            raise InputError("model shard", f"{where}/{file}", "a file that is there, as the index names it")
    return files, weight_map


def read_document(text: str, where: object, field: str = "model.base_model") -> dict[str, Any]:
    """A JSON object that somebody else wrote.

    Raises:
        InputError: it is none, or nested deeper than any config is.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(field, where, "valid JSON") from None
    if not isinstance(document, dict):
        raise InputError(field, where, "a JSON object")
    return document


def _describes(name: str, trusted: bool) -> bool:
    patterns = [*DESCRIPTION_FILES, *(["*.py"] if trusted else [])]
    return any(fnmatch(name, pattern) and name.count("/") <= pattern.count("/") for pattern in patterns) or (
        trusted and name.endswith(".py")
    )


def _model_files(trusted: bool) -> list[str]:
    return [*MODEL_FILES, *(["*.py"] if trusted else [])]


def _normal(name: str) -> str:
    """A path that exists as it is called from any folder; every other name as it is."""
    path = os.path.expanduser(name)
    if name == SAMPLE or not os.path.exists(path):
        return name
    real = os.path.realpath(path)
    # In a hub's cache a file's name is a link to one without a suffix.
    return real if Path(real).suffix == Path(path).suffix else os.path.abspath(path)


def _check(place: Place, name: str) -> None:
    if place.kind == "s3":
        _ = place.address
    if place.kind == "path" and not os.path.exists(place.text):
        raise InputError(place.field, name, _EXPECTED[place.holds])
