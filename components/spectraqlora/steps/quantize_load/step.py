"""The quantize-load step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import ModelSettings


@step
def run(
    *, base_model: str, content: str, model_settings: dict[str, Any], four_bit: Any, outline: Any
) -> None:
    from spectraqlora.steps.quantize_load.quantize import quantize

    section = ModelSettings(**{**model_settings, "base_model": base_model})
    result = quantize(section, output_folder(four_bit), output_folder(outline), content)
    four_bit.metadata.update(
        digest=result.base_digest, four_bit_share=result.four_bit_parameters / result.parameters
    )
    outline.metadata.update(digest=result.base_digest)
