"""The KFP component of select-layers."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="select-layers")
def select_layers(
    method: str,
    select_settings: dict,
    seed: int,
    four_bit: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    table: dsl.Input[dsl.Dataset],
    rank_map: dsl.Output[dsl.Artifact],
):
    """Turn the SNR table, and for sgm the gradients, into a method's rank map.

    Args:
        method: qlora, hybrid, alors, sgm or random.
        select_settings: the `select` section.
        seed: of calibration rows and projections.
        four_bit: the 4-bit model.
        rows: prepared rows, for calibration batches.
        table: SNR table.
        rank_map: rank map; for sgm also similarity matrix and first A.
    """
    from spectraqlora.steps.select_layers.step import run

    run(
        method=method,
        select_settings=select_settings,
        seed=seed,
        four_bit=four_bit,
        rows=rows,
        table=table,
        rank_map=rank_map,
    )
