"""Refusing weights that are no numbers: one NaN makes every loss NaN."""

from __future__ import annotations

from spectraqlora.errors import InputError
from spectraqlora.models.tensors import Tensors
from spectraqlora.runtime.console import Progress

_FLOATS = ("F64", "F32", "F16", "BF16")


def check_finite(tensors: Tensors, place: object) -> None:
    """Read every weight once, one tensor at a time.

    Args:
        tensors: of the model.
        place: the model, as messages name it.

    Raises:
        InputError: naming the first tensor that has NaN or infinity, and its file.
    """
    import torch

    names = [name for name in tensors.names() if name in tensors.packings or tensors.dtype(name) in _FLOATS]
    progress = Progress("reading weights", len(names))
    for done, name in enumerate(names, 1):
        weight = tensors.load(name)
        if weight.numel():
            # Both ends are NaN where any number is.
            low, high = torch.aminmax(weight)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                count = int((~torch.isfinite(weight)).sum())
                raise InputError(
                    "model.base_model",
                    f"{place}/{tensors.file(name)}",
                    f"finite weights; {count} of the {weight.numel()} numbers of {name} are NaN or infinite",
                )
        progress(done)
