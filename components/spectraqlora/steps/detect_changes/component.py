"""The KFP component of detect-changes."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def detect_changes(
    source: str,
    base_model: str,
    data_settings: dict,
    model_settings: dict,
    snr_settings: dict,
    tracking_settings: dict,
    recipe: str,
    changes: dsl.Output[dsl.Artifact],
    base_digest: dsl.OutputPath(str),  # type: ignore[valid-type]
    table_digest: dsl.OutputPath(str),  # type: ignore[valid-type]
    full_recipe: dsl.OutputPath(str),  # type: ignore[valid-type]
    base_content: str = "",
    table_content: str = "",
) -> str:
    """Digest the data; `unchanged` where a version was trained on it from the same base with the same settings.

    Args:
        source: of the data: hub id, file, folder or s3:// address.
        base_model: hub id, folder or s3:// address.
        data_settings: the `data` section.
        model_settings: the `model` section.
        snr_settings: the `snr` section.
        tracking_settings: the `tracking` section.
        recipe: digest of all settings that shape the training.
        changes: digest, decision and reason as JSON.
        base_digest: what the base model holds now.
        table_digest: what the SNR table given by `snr.table` holds now; `none` without one.
        full_recipe: digest of `recipe` and these two.
        base_content: what the base model holds, where that is known; it is not looked at then.
        table_content: what the SNR table holds, where that is known.
    """
    from spectraqlora.steps.detect_changes.step import run

    return run(
        source=source,
        base_model=base_model,
        base_content=base_content,
        table_content=table_content,
        data_settings=data_settings,
        model_settings=model_settings,
        snr_settings=snr_settings,
        tracking_settings=tracking_settings,
        recipe=recipe,
        changes=changes,
        base_digest=base_digest,
        table_digest=table_digest,
        full_recipe=full_recipe,
    )
