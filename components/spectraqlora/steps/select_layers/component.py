"""The KFP component of select-layers."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="select-layers")
def select_layers(
    method: str,
    settings: dict,
    seed: int,
    quantized: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    table: dsl.Input[dsl.Dataset],
    ranks: dsl.Output[dsl.Artifact],
):
    """Turn the SNR table, and for sgm the gradients, into a method's rank map.

    Args:
        method: qlora, hybrid, alors, sgm or random.
        settings: the `select` section.
        seed: of calibration rows and projections.
        quantized: 4-bit model artifact.
        data: prepared data, for calibration batches.
        table: SNR table.
        ranks: rank map; for sgm also similarity matrix and first A.
    """
    from spectraqlora.steps.select_layers.step import run

    run(method, settings, seed, quantized, data, table, ranks)
