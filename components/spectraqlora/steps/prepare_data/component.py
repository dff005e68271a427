"""The KFP component of prepare-data."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def prepare_data(
    source: str,
    content: str,
    data_settings: dict,
    seed: int,
    outline: dsl.Input[dsl.Artifact],
    rows: dsl.Output[dsl.Dataset],
):
    """Load, recognise, tokenize and split a data set.

    Args:
        source: hub id, file, folder or s3:// address.
        content: digest of the source's files, or the hub's commit, so that changed ones are not taken from the cache.
        data_settings: the `data` section.
        seed: of the split.
        outline: of the model, for its tokenizer.
        rows: tokenized training rows, held-out rows and test rows.
    """
    from spectraqlora.steps.prepare_data.step import run

    run(source=source, content=content, data_settings=data_settings, seed=seed, outline=outline, rows=rows)
