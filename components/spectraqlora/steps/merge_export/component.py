"""The KFP component of merge-export."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="merge-export")
def merge_export(
    evaluate_settings: dict,
    four_bit: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    winner: dsl.Input[dsl.Model],
    exported: dsl.Output[dsl.Model],
    export_settings: dict = {},  # noqa: B006 - KFP's form of a default
):
    """Merge into dequantized and original weights, export the better one, verify the export.

    Args:
        evaluate_settings: the `evaluate` section.
        four_bit: the 4-bit model.
        rows: prepared rows: the held-out ones choose the merge, the test rows are scored once.
        winner: the winner's adapter and evaluation.
        exported: `merged/` and `adapter/`.
        export_settings: the `export` section.
    """
    from spectraqlora.steps.merge_export.step import run

    run(
        evaluate_settings=evaluate_settings,
        export_settings=export_settings,
        four_bit=four_bit,
        rows=rows,
        winner=winner,
        exported=exported,
    )
