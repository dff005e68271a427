"""The KFP component of promote."""

from kfp import dsl

from spectraqlora.step_images import image


@dsl.component(base_image=image("re-evaluate"), install_kfp_package=False)
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
    from spectraqlora.step import run_promote

    run_promote(tracking, settings, evaluate, registered, decision)
