"""Names of weights: which tensor of a checkpoint a loaded model's parameter comes from, as transformers maps them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The checkpoint's tensor by the parameter that it becomes, where one becomes one.

    Tensors that transformers merges or cuts up on the way (experts, fused projections) have no entry.

    Args:
        model: of the checkpoint's class; on any device.
        names: of the checkpoint's tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    found: dict[str, str] = {}
    for name in names:
        becomes, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if becomes not in parameters and name in parameters:
            becomes, converted = name, None
        if becomes in parameters and converted is None:
            found[becomes] = name
    return found
