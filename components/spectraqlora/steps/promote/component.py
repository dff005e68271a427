"""The KFP component of promote."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="re-evaluate")
def promote(
    tracking: dict,
    settings: dict,
    evaluate: dict,
    registered: dsl.Input[dsl.Artifact],
    decision: dsl.Output[dsl.Metrics],
):
    """Let the gate decide whether the registered model becomes champion.

    Args:
        tracking: the `tracking` section.
        settings: the `promote` section.
        evaluate: the `evaluate` section.
        registered: model name and version.
        decision: what was decided, why, and the numbers of both models.
    """
    from spectraqlora.steps.promote.step import run

    run(tracking, settings, evaluate, registered, decision)
