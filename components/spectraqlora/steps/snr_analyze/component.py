"""The KFP component of snr-analyze."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="snr-analyze")
def snr_analyze(
    settings: dict, quantized: dsl.Input[dsl.Model], table: dsl.Output[dsl.Dataset], content: str = ""
):
    """Signal-to-noise ratio of every weight matrix.

    Args:
        settings: the `snr` section.
        quantized: 4-bit model artifact; it also names the original checkpoint.
        table: SNR table as Parquet, Spectrum JSON and heat map.
        content: digest of a table measured elsewhere, so that a changed one is not taken from the cache.
    """
    from spectraqlora.steps.snr_analyze.step import run

    run(settings, quantized, table)
