"""The KFP component of snr-analyze."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="snr-analyze")
def snr_analyze(
    snr_settings: dict,
    outline: dsl.Input[dsl.Artifact],
    table: dsl.Output[dsl.Dataset],
    content: str = "",
):
    """Signal-to-noise ratio of every weight matrix.

    Args:
        snr_settings: the `snr` section.
        outline: of the model; it also names the original checkpoint.
        table: SNR table as Parquet, Spectrum JSON and heat map.
        content: digest of a table measured elsewhere, so that a changed one is not taken from the cache.
    """
    from spectraqlora.steps.snr_analyze.step import run

    run(snr_settings=snr_settings, outline=outline, table=table)
