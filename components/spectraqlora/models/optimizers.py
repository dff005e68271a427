"""The optimizers of adapters: AdamW, and bitsandbytes' 8-bit AdamW on GPUs."""

from __future__ import annotations

from typing import Any

import torch

from spectraqlora.errors import InputError
from spectraqlora.models.hardware import device


def check_optimizer(name: str) -> None:
    """Refuse a `train.optimizer` that this machine cannot run.

    Raises:
        InputError: an 8-bit optimizer without a CUDA device; bitsandbytes has no kernels of it for CPUs.
    """
    if name != "adamw" and device() != "cuda":
        raise InputError("train.optimizer", name, "adamw; 8-bit optimizers need a CUDA device")


def make_optimizer(name: str, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names.

    Args:
        name: `adamw`, `adamw_8bit` or `paged_adamw_8bit`.
        groups: parameters with their learning rates, from `adapters.parameter_groups`.
        weight_decay: decoupled, as AdamW applies it.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay)
    import bitsandbytes as bnb

    kind = bnb.optim.AdamW8bit if name == "adamw_8bit" else bnb.optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, weight_decay=weight_decay)
    return optimizer
