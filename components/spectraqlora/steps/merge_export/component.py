"""The KFP component of merge-export."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="merge-export")
def merge_export(
    settings: dict,
    quantized: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    winner: dsl.Input[dsl.Model],
    exported: dsl.Output[dsl.Model],
    export: dict = {},  # noqa: B006 - KFP's form of a default
):
    """Merge into dequantized and original weights, export the better one, verify the export.

    Args:
        settings: the `evaluate` section.
        quantized: 4-bit model artifact.
        data: prepared data, for the eval rows.
        winner: the winner's adapter and evaluation.
        exported: `merged/` and `adapter/`.
        export: the `export` section.
    """
    from spectraqlora.steps.merge_export.step import run

    run(settings, export, quantized, data, winner, exported)
