"""Experts in 4 bits: fused tensors (experts x rows x columns), which are parameters and no layers.

A packed tensor is stored as a layer's weight is: bitsandbytes' codes with their scales. Who reads it from its module
gets a tensor that has no numbers until an operation needs them, in the forward pass and again in the backward pass:
autograd keeps the codes, and no more than one fused tensor is there in the compute type.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_BLOCK, _SCALE_BLOCK = 64, 256
_PACKED_AT_ONCE, _UNPACKED_AT_ONCE = 2**22, 2**30
"""Numbers: bitsandbytes takes 16 bytes for each that it packs on a CPU, and on a GPU less than 2^31 at a time."""
_NAMES = re.compile("expert|_moe")
_VIEWS = frozenset(
    [
        torch.ops.aten.alias.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.permute.default,
        torch.ops.aten.select.int,
        torch.ops.aten.t.default,
        torch.ops.aten.transpose.int,
    ]
)
"""What is done to a packed tensor before its numbers are read."""

View = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]


def is_fused(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is a fused tensor of experts."""
    return len(shape) == 3 and bool(_NAMES.search(name))


def can_pack(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is a fused tensor of experts whose numbers are whole blocks of 64."""
    return is_fused(name, shape) and not shape.numel() % _BLOCK


class FourBitTensor(torch.Tensor):
    """A packed tensor as operations see it: each that needs its numbers dequantizes them, and forgets them.

    Views stay packed, since the backward pass of a product keeps one.

    Args:
        codes: two to a byte, in bytes or stored as another type.
        state: their scales, and the tensor's shape and type (bitsandbytes' QuantState).
        views: what is done to the numbers after unpacking, in order.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: torch.Tensor, state: Any, views: tuple[View, ...] = ()) -> FourBitTensor:
        like = _viewed(torch.empty(state.shape, dtype=state.dtype, device="meta"), views)
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=codes.device
        )

    def __init__(self, codes: torch.Tensor, state: Any, views: tuple[View, ...] = ()) -> None:
        self.packed = codes, state, views

    def dequantized(self) -> torch.Tensor:
        """The numbers, in the type that they were packed from; of one expert, if only that one is asked for."""
        codes, state, views = self.packed
        shape, matrix = torch.Size(state.shape), math.prod(state.shape[1:])
        start, stop = 0, shape.numel()
        if views and views[0][0] is torch.ops.aten.select.int and not matrix % state.blocksize:
            axis, index = views[0][1]
            if axis in (0, -3):
                start = index % shape[0] * matrix
                stop, shape, views = start + matrix, shape[1:], views[1:]
        return _viewed(_numbers(codes, state, start, stop).view(shape), views)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _VIEWS and not kwargs:
            codes, state, views = args[0].packed
            return cls(codes, state, (*views, (func, args[1:])))
        args, kwargs = tree_map_only(cls, cls.dequantized, (args, kwargs or {}))
        return func(*args, **kwargs)


def _viewed(tensor: torch.Tensor, views: tuple[View, ...]) -> torch.Tensor:
    for view, arguments in views:
        tensor = view(tensor, *arguments)
    return tensor


def _numbers(codes: torch.Tensor, state: Any, start: int, stop: int) -> torch.Tensor:
    """The numbers from `start`, the first of a block, to `stop`, the last of one or of all, in one axis."""
    from bitsandbytes import functional

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2).float() + state.offset
    codes, block = codes.detach().view(-1).view(torch.uint8), state.blocksize
    pieces = []
    for first in range(start, stop, _UNPACKED_AT_ONCE):
        last = min(first + _UNPACKED_AT_ONCE, stop)
        scales = absmax[first // block : -(-last // block)]
        pieces.append(
            torch.ops.bitsandbytes.dequantize_4bit(
                codes[first // 2 : -(-last // 2)],
                scales,
                block,
                state.quant_type,
                [last - first],
                state.dtype,
            ).view(-1)
        )
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def pack(tensor: torch.Tensor, quant_type: str, double: bool, storage: torch.dtype) -> Any:
    """A fused tensor as bitsandbytes' parameter, whose `quant_state` has shape and scales; packed piece by piece.

    Args:
        tensor: experts x rows x columns.
        quant_type: nf4 or fp4.
        double: scales are quantized, too.
        storage: type that the codes are stored as.
    """
    import bitsandbytes as bnb
    from bitsandbytes import functional

    flat = tensor.detach().reshape(-1)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(flat.numel() // _BLOCK, dtype=torch.float32, device=flat.device)
    for first in range(0, flat.numel(), _PACKED_AT_ONCE):
        part = flat[first : first + _PACKED_AT_ONCE]
        piece, state = functional.quantize_4bit(part, blocksize=_BLOCK, quant_type=quant_type)
        codes[first // 2 :][: piece.numel()] = piece.view(-1)
        absmax[first // _BLOCK :][: state.absmax.numel()] = state.absmax
    offset = scales = None
    if double:
        offset = absmax.mean()
        absmax, scales = functional.quantize_blockwise(absmax - offset, blocksize=_SCALE_BLOCK)
    state = functional.QuantState(
        absmax=absmax,
        shape=tensor.shape,
        dtype=tensor.dtype,
        blocksize=_BLOCK,
        code=functional.get_4bit_type(quant_type, device=flat.device),
        quant_type=quant_type,
        offset=offset,
        state2=scales,
    )
    return bnb.nn.Params4bit(
        codes.view(storage)[:, None],
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=double,
        quant_type=quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )


def hold(module: Any, name: str, state: Any) -> None:
    """Let a module read its parameter `name`, which is packed or about to be, through its scales."""
    states = {**getattr(module, "four_bit_states", {}), name: state}
    if "four_bit_states" in module.__dict__:
        module.__class__ = type(module).__base__
    kind: Any = type(module)
    module.__class__ = _reading(kind, tuple(sorted(states)))
    module.four_bit_states = states
    module._is_hf_initialized = True  # Else transformers would, reading it.


@functools.lru_cache
def _reading(kind: type, names: tuple[str, ...]) -> type:
    """A class of modules as `kind`, whose parameters `names` are packed."""

    def read(name: str) -> property:
        def numbers(module: Any) -> torch.Tensor:
            codes: torch.Tensor = module._parameters[name]
            if hasattr(codes, "placements"):  # FSDP asks for its shard.
                return codes
            # The state is the module's, since what FSDP gathers from shards has none.
            return FourBitTensor(codes, module.four_bit_states[name])

        return property(numbers)

    def save(module: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        kind._save_to_state_dict(module, destination, prefix, keep_vars)  # type: ignore[attr-defined]
        for name, state in module.four_bit_states.items():
            for part, tensor in state.as_dict(packed=True).items():
                destination[f"{prefix}{name}.{part}"] = tensor

    return type(
        kind.__name__,
        (kind,),
        {
            **{name: read(name) for name in names},
            "_save_to_state_dict": save,
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
        },
    )


def packed_experts(model: torch.nn.Module) -> Iterator[tuple[str, FourBitTensor]]:
    """The packed fused tensors of a model, by the parameter's name."""
    for prefix, module in model.named_modules():
        for name in getattr(module, "four_bit_states", ()):
            yield f"{prefix}.{name}", getattr(module, name)
