"""The KFP component of snr-analyze."""

from typing import Optional

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="snr-analyze")
def snr_analyze(
    snr_settings: dict,
    outline: dsl.Input[dsl.Artifact],
    table: dsl.Output[dsl.Dataset],
    content: str = "",
    four_bit: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045 - the KFP compiler reads this form
):
    """Signal-to-noise ratio of every weight matrix.

    Args:
        snr_settings: the `snr` section.
        outline: of the model; it also names the original checkpoint.
        table: SNR table as Parquet, Spectrum JSON and heat map.
        content: digest of a table measured elsewhere, so that a changed one is not taken from the cache.
        four_bit: the 4-bit model, where its weights are measured (snr.source=quantized).
    """
    from spectraqlora.steps.snr_analyze.step import run

    run(snr_settings=snr_settings, outline=outline, four_bit=four_bit, table=table)
