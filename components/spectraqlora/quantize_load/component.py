"""The KFP component of quantize-load."""

from kfp import dsl

from spectraqlora.step_images import image


@dsl.component(base_image=image("quantize-load"), install_kfp_package=False)
def quantize_load(base_model: str, content: str, settings: dict, quantized: dsl.Output[dsl.Model]):
    """Quantize the base model to 4-bit NF4 with double quantization.

    Args:
        base_model: hub id, folder or s3:// address.
        content: digest of the folder, local or not, so that changed files are not taken from the cache.
        settings: the `model` section.
        quantized: 4-bit model with tokenizer and manifest.
    """
    from spectraqlora.step import run_quantize_load

    run_quantize_load(base_model, content, settings, quantized)
