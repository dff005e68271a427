"""The step's work: digest the data and look whether some version was trained on it already."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from spectraqlora.errors import InputError
from spectraqlora.files import file_digest, folder_digest
from spectraqlora.settings import DataSettings, is_address
from spectraqlora.tracking.registry import CHAMPION, Version

UNCHANGED = "unchanged"
SOURCE_DIGEST, RECIPE_DIGEST = "source_digest", "recipe_digest"
"""Tags of a version: the data it was trained on, and the settings that it was trained with."""


@dataclass(frozen=True)
class Changes:
    """The data's digest, whether there is something to train, and why."""

    digest: str
    changed: bool
    reason: str


def source_digest(settings: DataSettings) -> str:
    """Digest of a data source's content as it is now; of a hub id, its revision.

    Raises:
        InputError: it is not there, or its hub does not answer.
    """
    if is_address(settings.source):
        from spectraqlora import storage

        return storage.content_digest(storage.parse_address(settings.source, "data.source"))
    path = Path(settings.source)
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return folder_digest(path)
    if settings.source[:1] in ("/", ".", "~"):
        raise InputError("data.source", settings.source, "an existing file or folder")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        revision = HfApi().dataset_info(settings.source).sha
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            "data.source", settings.source, f"an existing file or a reachable hub data set ({first})"
        ) from None
    return hashlib.sha256(f"{settings.source}@{revision}".encode()).hexdigest()


def changed_since_champion(digest: str, recipe: str, versions: list[Version]) -> Changes:
    """Whether data and settings differ from those of every version: what was trained once is known.

    Args:
        digest: of the data.
        recipe: of all settings that shape the training.
        versions: of the registered model, newest first.
    """
    champion = next((v for v in versions if CHAMPION in v.aliases), None)
    for version in versions:
        tags = version.tags
        if tags.get(SOURCE_DIGEST) == digest and tags.get(RECIPE_DIGEST) == recipe:
            if version == champion:
                return Changes(digest, False, f"nothing changed since the champion, version {version.number}")
            what = tags.get("promotion.decision", "not decided on yet, which `spectraqlora promote` does")
            return Changes(digest, False, f"version {version.number} was made of the same data: {what}")
    if champion is None:
        return Changes(digest, True, "there is no champion yet")
    same = champion.tags.get(SOURCE_DIGEST) == digest
    return Changes(
        digest,
        True,
        f"{'settings' if same else 'data'} changed since the champion, version {champion.number}",
    )
