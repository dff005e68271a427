"""The KFP component of select-layers."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="select-layers")
def select_layers(
    method: str,
    select_settings: dict,
    seed: int,
    outline: dsl.Input[dsl.Artifact],
    table: dsl.Input[dsl.Dataset],
    measurement: dsl.Input[dsl.Metrics],
    rank_map: dsl.Output[dsl.Artifact],
):
    """Turn the SNR table, or the base's gradients, into a method's rank map; nothing is measured here.

    Args:
        method: name of the method.
        select_settings: the `select` section.
        seed: of what a method draws.
        outline: of the model, for its matrices.
        table: SNR table.
        measurement: of the base, for its gradient sketches.
        rank_map: which modules get an adapter, and of which rank; with it the similarity that made groups, and the
            first A where adapters start from the gradients.
    """
    from spectraqlora.steps.select_layers.step import run

    run(
        method=method,
        select_settings=select_settings,
        seed=seed,
        outline=outline,
        table=table,
        measurement=measurement,
        rank_map=rank_map,
    )
