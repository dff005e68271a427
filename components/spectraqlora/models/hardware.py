"""What this machine computes on, in which type, and how much memory was taken."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu_memory_bytes() -> int:
    """Memory of the first GPU; 0 where there is none."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def compute_dtype(choice: str) -> torch.dtype:
    """The compute type of a setting; `auto` follows the hardware.

    On CPUs without bfloat16 instructions a QLoRA step is about 20 times slower in bfloat16 than in
    float32, and no CPU gains enough from it to be worth the lost digits: `auto` takes float32 there.
    """
    import torch

    if choice != "auto":
        dtype = getattr(torch, choice)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def peak_memory_bytes() -> int:
    """Peak GPU memory allocated where there is a GPU, else this process's peak resident memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
