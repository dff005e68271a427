"""The KFP component of promote."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="re-evaluate")
def promote(
    tracking_settings: dict,
    promote_settings: dict,
    evaluate_settings: dict,
    registered: dsl.Input[dsl.Artifact],
    decision: dsl.Output[dsl.Metrics],
    export_settings: dict = {},  # noqa: B006 - KFP's form of a default
):
    """Let the gate decide whether the registered model becomes champion.

    Args:
        tracking_settings: the `tracking` section.
        promote_settings: the `promote` section.
        evaluate_settings: the `evaluate` section.
        registered: model name and version.
        decision: what was decided, why, and the numbers of both models.
        export_settings: the `export` section.
    """
    from spectraqlora.steps.promote.step import run

    run(
        tracking_settings=tracking_settings,
        promote_settings=promote_settings,
        evaluate_settings=evaluate_settings,
        export_settings=export_settings,
        registered=registered,
        decision=decision,
    )
