"""The KFP component of detect-changes."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def detect_changes(
    source: str,
    data_settings: dict,
    tracking_settings: dict,
    recipe: str,
    changes: dsl.Output[dsl.Artifact],
) -> str:
    """Digest the data; `unchanged` where a version was trained on it with the same settings, else the digest.

    Args:
        source: hub id, file or folder.
        data_settings: the `data` section.
        tracking_settings: the `tracking` section.
        recipe: digest of all settings that shape the training.
        changes: digest, decision and reason as JSON.
    """
    from spectraqlora.steps.detect_changes.step import run

    return run(
        source=source,
        data_settings=data_settings,
        tracking_settings=tracking_settings,
        recipe=recipe,
        changes=changes,
    )
