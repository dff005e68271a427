"""The KFP component of detect-changes."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def detect_changes(
    source: str,
    settings: dict,
    tracking: dict,
    recipe: str,
    changes: dsl.Output[dsl.Artifact],
) -> str:
    """Digest the data; `unchanged` where a version was trained on it with the same settings, else the digest.

    Args:
        source: hub id, file or folder.
        settings: the `data` section.
        tracking: the `tracking` section.
        recipe: digest of all settings that shape the training.
        changes: digest, decision and reason as JSON.
    """
    from spectraqlora.steps.detect_changes.step import run

    return run(source, settings, tracking, recipe, changes)
