"""The KFP component of quantize-load."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="quantize-load")
def quantize_load(base_model: str, content: str, settings: dict, quantized: dsl.Output[dsl.Model]):
    """Quantize the base model to 4-bit NF4 with double quantization.

    Args:
        base_model: hub id, folder or s3:// address.
        content: digest of the folder, local or not, so that changed files are not taken from the cache.
        settings: the `model` section.
        quantized: 4-bit model with tokenizer and manifest.
    """
    from spectraqlora.steps.quantize_load.step import run

    run(base_model, content, settings, quantized)
