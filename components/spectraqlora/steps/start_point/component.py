"""The KFP component of start-point."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def start_point(
    tracking_settings: dict,
    rank_map: dsl.Input[dsl.Artifact],
    start_rank_map: dsl.Output[dsl.Artifact],
    start_adapter: dsl.Output[dsl.Model],
):
    """Take rank map and adapter from the champion where they fit, else pass the fresh rank map on.

    Args:
        tracking_settings: the `tracking` section.
        rank_map: of select-layers, for method and base.
        start_rank_map: the rank map to train.
        start_adapter: the champion's adapter; only a file `none.txt` where training starts from the base.
    """
    from spectraqlora.steps.start_point.step import run

    run(
        tracking_settings=tracking_settings,
        rank_map=rank_map,
        start_rank_map=start_rank_map,
        start_adapter=start_adapter,
    )
