"""The KFP component of prepare-data."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def prepare_data(
    source: str,
    content: str,
    settings: dict,
    seed: int,
    tokenizer: dsl.Input[dsl.Model],
    data: dsl.Output[dsl.Dataset],
):
    """Load, recognise, tokenize and split a data set.

    Args:
        source: hub id, file, folder or s3:// address.
        content: digest of the source's files, so that changed ones are not taken from the cache.
        settings: the `data` section.
        seed: of the split.
        tokenizer: 4-bit model artifact, for its tokenizer.
        data: tokenized train and eval splits.
    """
    from spectraqlora.steps.prepare_data.step import run

    run(source, content, settings, seed, tokenizer, data)
