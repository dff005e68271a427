"""The KFP component of start-point."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def start_point(
    tracking: dict,
    ranks: dsl.Input[dsl.Artifact],
    start_ranks: dsl.Output[dsl.Artifact],
    start_adapter: dsl.Output[dsl.Model],
):
    """Take rank map and adapter from the champion where they fit, else pass the fresh rank map on.

    Args:
        tracking: the `tracking` section.
        ranks: rank map of select-layers, for method and base.
        start_ranks: the rank map to train.
        start_adapter: the champion's adapter; an empty folder where training starts from the base.
    """
    from spectraqlora.steps.start_point.step import run

    run(tracking, ranks, start_ranks, start_adapter)
