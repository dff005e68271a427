"""The step's work: digest the data and look whether some version was trained on it already."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from spectraqlora.places import base_place, data_places, file_place, joined_contents
from spectraqlora.settings import DataSettings, ModelSettings, SnrSettings
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
    """What identifies the content of all data sources as it is now; of a hub id, its commit.

    Raises:
        InputError: it is not there, or its hub does not answer.
    """
    return joined_contents([place.digest() for place in data_places(settings)])


def base_content_of(settings: ModelSettings) -> str:
    """What identifies the base model's content as it is now; of a hub id, its commit.

    Raises:
        InputError: it is not there, or its hub or store does not answer.
    """
    return base_place(settings.base_model, settings.revision, settings.trust_remote_code).digest()


def table_content_of(settings: SnrSettings) -> str:
    """What identifies the content of the SNR table that is given; `none` where none is.

    Raises:
        InputError: it is not there, or its store does not answer.
    """
    return file_place(settings.table, "snr.table").digest() if settings.table else "none"


def recipe_with(recipe: str, base: str, table: str) -> str:
    """Digest of all that shapes a retrained model besides its data: settings, base model and SNR table."""
    return hashlib.sha256(json.dumps([recipe, base, table]).encode()).hexdigest()


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
