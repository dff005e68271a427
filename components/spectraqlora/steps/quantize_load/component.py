"""The KFP component of quantize-load."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="quantize-load")
def quantize_load(
    base_model: str,
    content: str,
    model_settings: dict,
    four_bit: dsl.Output[dsl.Model],
    outline: dsl.Output[dsl.Artifact],
):
    """Quantize the base model to 4-bit NF4 with double quantization.

    Args:
        base_model: hub id, folder or s3:// address.
        content: digest of the model's files, or the hub's commit, so that another model is not taken from the cache.
        model_settings: the `model` section.
        four_bit: 4-bit model with tokenizer and manifest.
        outline: the model's configs, tokenizer and list of matrices, without weights.
    """
    from spectraqlora.steps.quantize_load.step import run

    run(
        base_model=base_model,
        content=content,
        model_settings=model_settings,
        four_bit=four_bit,
        outline=outline,
    )
