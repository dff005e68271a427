"""Weights that a checkpoint stores packed: which tensors belong together, the matrix they stand for, and how to get it.

One matrix is unpacked at a time, on the CPU, so that memory stays that of the largest. Layouts are those that the
formats' own writers document: bitsandbytes' state dicts, compressed-tensors' formats, DeepSeek's block-wise FP8,
AutoGPTQ's and AutoAWQ's packed int32, OCP microscaling as gpt-oss stores it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from spectraqlora.errors import InputError
from spectraqlora.models.headers import Entry

if TYPE_CHECKING:
    import torch

    from spectraqlora.models.experts import FourBitTensor

Raw = Callable[[str], "torch.Tensor"]
"""A stored tensor by name, as it is in the file."""
_STATE = ".quant_state.bitsandbytes__"
"""Shape and type of a packed 4-bit tensor are next to it, under the tensor's name, this and nf4 or fp4."""
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number, by the types that weights are unpacked to."""
METHODS = "bitsandbytes (4-bit, 8-bit), fp8, gptq, awq, mxfp4, compressed-tensors (FP8, int8, pack-quantized)"
"""`quantization_config.quant_method` that can be read, in words."""


class Packing(ABC):
    """One matrix (or a stack of them) as it is stored in parts.

    Args:
        name: of the tensor that it stands for.
        shape: unpacked.
        parts: the stored tensors that it is made of.
        bytes_per_number: of what `unpack` returns.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], parts: list[str], bytes_per_number: int = 4
    ) -> None:
        self.name, self.shape, self.parts = name, shape, parts
        self.bytes = math.prod(shape) * bytes_per_number

    @abstractmethod
    def unpack(self, raw: Raw) -> torch.Tensor:
        """The matrix, in float32 or in the type that the checkpoint names."""

    def unpack_slice(self, raw: Raw, index: int) -> torch.Tensor:
        """One slice of the first axis of a stack."""
        return self.unpack(raw)[index]


def packings(
    entries: Mapping[str, Entry], quantization: Mapping[str, Any], raw: Raw, where: object
) -> dict[str, Packing]:
    """The packed matrices of a checkpoint, by the names of the tensors that they stand for.

    Args:
        entries: the tensors of all its files.
        quantization: `quantization_config` of its config; empty where it has none.
        raw: reads a small stored tensor: a 4-bit state.
        where: the checkpoint, as messages name it.

    Raises:
        InputError: a format that is not read here, or parts that are missing or do not fit together.
    """
    described = _FourBit.all_of(entries, raw, where)
    method = str(quantization.get("quant_method", "")).lower() if quantization else ""
    if not quantization or (method == "bitsandbytes" and _flag(quantization, "load_in_4bit")):
        rest = described
    elif method == "bitsandbytes" or (not method and _flag(quantization, "load_in_8bit")):
        rest = described | _Int8.all_of(entries, where)
    elif method in ("fp8", "fbgemm_fp8", "compressed-tensors"):
        from spectraqlora.models.packed_integers import PackQuantized

        _check_compressed(quantization, where)
        rest = _Scaled.all_of(entries, quantization, where) | PackQuantized.all_of(entries, raw, where)
    elif method in ("gptq", "awq"):
        rest = _Int32.all_of(entries, quantization, method, where)
    elif method == "mxfp4":
        rest = _MxFp4.all_of(entries, where)
    elif not method and _flag(quantization, "load_in_4bit"):
        rest = described
    else:
        shown = method or "none"
        raise refused(where, "quantization_config", f"quant_method one of {METHODS}; it is {shown!r}")
    _check_codes(entries, rest, where)
    return rest


def _flag(quantization: Mapping[str, Any], name: str) -> bool:
    return bool(quantization.get(name) or quantization.get(f"_{name}"))


def _check_codes(entries: Mapping[str, Entry], packed: Mapping[str, Packing], where: object) -> None:
    """Refuse matrices of codes that belong to no packing: they would be taken for weights."""
    parts = {part for packing in packed.values() for part in packing.parts}
    for name, entry in entries.items():
        coded = entry.dtype in ("U8", "I8", "I32", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0")
        if coded and len(entry.shape) >= 2 and name not in parts:
            raise refused(
                where, name, f"weights; its numbers are {entry.dtype}, and nothing says how to read them"
            )


class _FourBit(Packing):
    """bitsandbytes' nf4 or fp4: two codes a byte, a scale for each block, the scales perhaps quantized as well.

    A layer's matrix, or fused experts as quantize-load packs them.
    """

    def __init__(self, name: str, state: Mapping[str, Any], parts: list[str]) -> None:
        super().__init__(name, tuple(state["shape"]), parts, _FLOATS[state["dtype"]])

    @classmethod
    def all_of(cls, entries: Mapping[str, Entry], raw: Raw, where: object) -> dict[str, Packing]:
        states = {name.partition(_STATE)[0]: name for name in entries if _STATE in name}
        packed: dict[str, Packing] = {}
        for owner, stored in states.items():
            if owner not in entries or entries[stored].end - entries[stored].begin > 1 << 16:
                raise refused(where, owner, "packed codes next to their state; there are none")
            state = cls._state(stored, raw, where)
            cls._check(entries, owner, state, where)
            packed[owner] = cls(
                owner, state, [name for name in entries if name.startswith(owner + ".")] + [owner]
            )
        return packed

    @staticmethod
    def _state(stored: str, raw: Raw, where: object) -> dict[str, Any]:
        """What a state says, after it was found to say what bitsandbytes reads of it."""
        try:
            state = json.loads(bytes(raw(stored).tolist()))
            shape, nested = state["shape"], "nested_blocksize" in state
            sizes = [*shape, state["blocksize"], *([state["nested_blocksize"]] if nested else [])]
            whole = all(isinstance(size, int) and size > 0 for size in sizes)
            right = (
                whole
                and len(shape) in (2, 3)
                and state["dtype"] in _FLOATS
                and state["blocksize"] in _BLOCK_SIZES
                and state["quant_type"] == stored.partition(_STATE)[2]
                and state["quant_type"] in ("nf4", "fp4")
            )
            if right and nested:
                right = (
                    state["nested_blocksize"] in _BLOCK_SIZES
                    and state["nested_dtype"] == "float32"
                    and math.isfinite(state["nested_offset"])
                )
            if not right:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise refused(
                where,
                stored,
                "the state of a packed tensor: shape, dtype, blocksize, quant_type, and those of nested scales",
            ) from None
        return dict(state)

    @staticmethod
    def _check(entries: Mapping[str, Entry], owner: str, state: Mapping[str, Any], where: object) -> None:
        """Refuse other types, or fewer bytes or scales, than the shape needs: unpacking would read past them."""
        numbers = math.prod(state["shape"])
        blocks = -(-numbers // state["blocksize"])
        nested = state.get("nested_blocksize")
        scales = ("U8",) if nested else ("F32", "F16", "BF16")
        needed = {f"{owner}.absmax": (blocks, scales), f"{owner}.quant_map": (16, ("F32",))}
        if nested or f"{owner}.nested_absmax" in entries:
            if not nested:
                raise refused(where, owner, "a nested_blocksize, as its nested scales need")
            needed |= {
                f"{owner}.nested_absmax": (-(-blocks // nested), ("F32",)),
                f"{owner}.nested_quant_map": (256, ("F32",)),
            }
        codes = entries[owner]
        if codes.end - codes.begin != -(-numbers // 2):
            raise refused(
                where, owner, f"{-(-numbers // 2)} bytes, as the packed shape {state['shape']} needs; it has "
                f"{codes.end - codes.begin}"
            )  # fmt: skip
        for part, (wanted, types) in needed.items():
            entry = entries.get(part)
            if entry is None or entry.numbers != wanted or entry.dtype not in types:
                has = "there is none" if entry is None else f"it has {entry.numbers} of {entry.dtype}"
                raise refused(
                    where, part, f"{wanted} numbers of {' or '.join(types)}, as the packed shape {state['shape']} "
                    f"needs; {has}"
                )  # fmt: skip

    def unpack(self, raw: Raw) -> torch.Tensor:
        return self._packed(raw).dequantized()

    def unpack_slice(self, raw: Raw, index: int) -> torch.Tensor:
        return self._packed(raw).select(0, index).dequantized()  # type: ignore[attr-defined]

    def _packed(self, raw: Raw) -> FourBitTensor:
        import torch
        from bitsandbytes.functional import QuantState

        from spectraqlora.models.experts import FourBitTensor

        parts = {part: raw(part) for part in self.parts if part != self.name}
        return FourBitTensor(raw(self.name), QuantState.from_dict(parts, device=torch.device("cpu")))


class _Int8(Packing):
    """bitsandbytes' LLM.int8: int8 codes, and `SCB`, each row's largest absolute value: W = codes · SCB / 127."""

    @classmethod
    def all_of(cls, entries: Mapping[str, Entry], where: object) -> dict[str, Packing]:
        packed: dict[str, Packing] = {}
        for name, entry in entries.items():
            if entry.dtype != "I8" or not name.endswith(".weight"):
                continue
            scales = name.removesuffix("weight") + "SCB"
            if len(entry.shape) != 2 or scales not in entries or entries[scales].numbers != entry.shape[0]:
                raise refused(where, name, f"a row's scale for each of its rows in {scales}")
            extra = name.removesuffix("weight") + "weight_format"
            packed[name] = cls(name, entry.shape, [name, scales, *([extra] if extra in entries else [])])
        return packed

    def unpack(self, raw: Raw) -> torch.Tensor:
        return raw(self.name).float() * (raw(self.parts[1]).float() / 127)[:, None]


_SCALES, _ZERO = ("weight_scale_inv", "weight_scale"), "weight_zero_point"


class _Scaled(Packing):
    """FP8 or int8 numbers with one scale for the tensor, for each row, or for each block of rows and columns.

    DeepSeek's `weight_scale_inv` is the factor itself, as compressed-tensors' `weight_scale` is.
    """

    @classmethod
    def all_of(
        cls, entries: Mapping[str, Entry], quantization: Mapping[str, Any], where: object
    ) -> dict[str, Packing]:
        packed: dict[str, Packing] = {}
        block = quantization.get("weight_block_size")
        for name, entry in entries.items():
            coded = entry.dtype in ("F8_E4M3", "F8_E5M2", "I8") and len(entry.shape) >= 2
            if not coded or name.endswith(f".{_ZERO}"):
                continue
            stem = name.removesuffix("weight")
            scale = next((stem + kind for kind in _SCALES if stem + kind in entries), None)
            if len(entry.shape) != 2 or scale is None:
                raise refused(where, name, f"a scale next to it, {stem}{_SCALES[0]} or {stem}{_SCALES[1]}")
            cls._check(name, entry, scale, entries[scale], block, where)
            extra = [stem + kind for kind in ("input_scale", "activation_scale", _ZERO)]
            if stem + _ZERO in entries and entries[stem + _ZERO].numbers not in (1, entry.shape[0]):
                raise refused(where, stem + _ZERO, f"a zero for all, or for each row of {name}")
            packed[name] = cls(name, entry.shape, [name, scale, *(part for part in extra if part in entries)])
            packed[name].block = tuple(block) if isinstance(block, list) else ()  # type: ignore[attr-defined]
        return packed

    block: tuple[int, ...] = ()

    @staticmethod
    def _check(name: str, entry: Entry, scale: str, scales: Entry, block: Any, where: object) -> None:
        rows, cols = entry.shape
        grids = [(1, 1), (rows, 1)]
        if isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block):
            grids.append((-(-rows // block[0]), -(-cols // block[1])))
        grid = tuple(scales.shape) if len(scales.shape) == 2 else (scales.numbers, 1)
        if grid not in grids:
            raise refused(
                where, scale, f"a scale for all, each row or each block of {name}, {list(entry.shape)}; it has the "
                f"shape {list(scales.shape)}"
            )  # fmt: skip

    def unpack(self, raw: Raw) -> torch.Tensor:
        import torch

        weight, scale = raw(self.name).float(), raw(self.parts[1])
        # A scale of eight bits is a power of two (E8M0).
        scale = scale.float() if scale.dtype != torch.uint8 else torch.exp2(scale.float() - 127)
        rows, cols = self.shape
        zero = next((part for part in self.parts if part.endswith(_ZERO)), None)
        if zero is not None:
            weight.sub_(raw(zero).float().reshape(-1, 1))
        if scale.numel() in (1, rows) and (scale.ndim < 2 or scale.shape[1] == 1):
            return weight.mul_(scale.reshape(-1, 1))
        high, wide = self.block
        for top in range(scale.shape[0]):
            band = scale[top].repeat_interleave(wide)[:cols]
            weight[top * high : (top + 1) * high].mul_(band)
        return weight


def _check_compressed(quantization: Mapping[str, Any], where: object) -> None:
    """Refuse formats of compressed-tensors whose numbers are not a scale away from the weights."""
    if str(quantization.get("quant_method")) != "compressed-tensors":
        return
    known = ("float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "dense")
    groups = quantization.get("config_groups")
    formats = {quantization.get("format")}
    if isinstance(groups, Mapping):
        formats |= {group.get("format") for group in groups.values() if isinstance(group, Mapping)}
    formats.discard(None)
    for name in sorted(map(str, formats)):
        if name not in known:
            raise refused(
                where,
                "quantization_config",
                f"a format of compressed-tensors among {', '.join(known)}; it is {name!r}",
            )


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AutoAWQ puts the eight codes of a word, seen from the lowest bits: code i is nibble _AWQ_ORDER[i]."""


class _Int32(Packing):
    """GPTQ and AWQ: codes in int32 words, a scale and a zero for each group of inputs; W is stored in x out.

    GPTQ packs inputs, least significant first, and stores zeros less one (unless `checkpoint_format` is gptq_v2);
    `g_idx` says which group an input is of. AWQ packs outputs, interleaved.
    """

    bits: int
    awq: bool
    zero_offset: int

    @classmethod
    def all_of(
        cls, entries: Mapping[str, Entry], quantization: Mapping[str, Any], method: str, where: object
    ) -> dict[str, Packing]:
        bits = quantization.get("bits", quantization.get("w_bit", 4))
        version = str(quantization.get("version", "gemm")).lower()
        if method == "awq" and (bits != 4 or version != "gemm"):
            raise refused(
                where, "quantization_config", f"AWQ of 4 bits, version gemm; it is {bits} bits, {version}"
            )
        if bits not in (2, 4, 8):
            raise refused(
                where, "quantization_config", f"{method.upper()} codes of 2, 4 or 8 bits; it says {bits!r}"
            )
        packed: dict[str, Packing] = {}
        for name in entries:
            if not name.endswith(".qweight"):
                continue
            stem = name.removesuffix("qweight")
            parts = [name, stem + "qzeros", stem + "scales"]
            for part in parts:
                if part not in entries:
                    raise refused(where, part, f"a tensor; {name} cannot be read without it")
            if stem + "g_idx" in entries:
                parts.append(stem + "g_idx")
            packing = cls(stem + "weight", cls._shape(entries, parts, bits, method == "awq", where), parts)
            packing.bits, packing.awq = bits, method == "awq"
            packing.zero_offset = (
                0 if method == "awq" or quantization.get("checkpoint_format") == "gptq_v2" else 1
            )
            packed[packing.name] = packing
        return packed

    @staticmethod
    def _shape(
        entries: Mapping[str, Entry], parts: list[str], bits: int, awq: bool, where: object
    ) -> tuple[int, int]:
        """The matrix's shape, out x in, after the parts' shapes were held against each other."""
        each = 32 // bits
        shapes = [entries[part].shape for part in parts]
        words, zeros, scales = shapes[:3]
        fits = all(len(shape) == 2 for shape in shapes[:3]) and {entries[p].dtype for p in parts[:2]} == {
            "I32"
        }
        if fits:
            inputs, outputs = (words[0], words[1] * each) if awq else (words[0] * each, words[1])
            groups = scales[0]
            fits = scales[1] == outputs and zeros == (groups, outputs // each) and outputs % each == 0
            fits = fits and 0 < groups <= inputs and (len(parts) == 4 or inputs % groups == 0)
            if len(parts) == 4:
                fits = fits and shapes[3] == (inputs,)
        if not fits:
            raise refused(where, parts[0], f"{bits}-bit codes with zeros and scales that fit them; the shapes are "
                           f"{[list(shape) for shape in shapes]}")  # fmt: skip
        return outputs, inputs

    def unpack(self, raw: Raw) -> torch.Tensor:
        import torch

        words, zero_words, scales, *index = (raw(part) for part in self.parts)
        inputs = self.shape[1]
        groups = scales.shape[0]
        if index:
            group = index[0].long()
            if int(group.min()) < 0 or int(group.max()) >= groups:
                raise refused("checkpoint", self.parts[3], f"groups below {groups}")
        else:
            group = torch.arange(inputs) // (inputs // groups)
        codes = self._codes(words, 1 if self.awq else 0)
        zeros = self._codes(zero_words, 1) + self.zero_offset
        weight = codes.sub_(zeros[group]).float().mul_(scales.float()[group])
        return weight.T.contiguous()

    def _codes(self, words: torch.Tensor, axis: int) -> torch.Tensor:
        """The codes in int32 words, unpacked along an axis, as int16."""
        import torch

        each, mask = 32 // self.bits, 2**self.bits - 1
        order = _AWQ_ORDER if self.awq else range(each)
        pieces = [((words >> (self.bits * place)) & mask).to(torch.int16) for place in order]
        stacked = torch.stack(pieces, dim=axis + 1)
        rows, cols = words.shape
        return stacked.reshape((rows * each, cols) if axis == 0 else (rows, cols * each))


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of E2M1 by code."""


class _MxFp4(Packing):
    """gpt-oss: two FP4 codes a byte, low bits first, and a power of two for each 32; experts x out x in.

    The model holds its experts as in x out: what is returned is transposed, as transformers does it.
    """

    @classmethod
    def all_of(cls, entries: Mapping[str, Entry], where: object) -> dict[str, Packing]:
        packed: dict[str, Packing] = {}
        for name, entry in entries.items():
            if not name.endswith("_blocks"):
                continue
            owner = name.removesuffix("_blocks")
            scales = entries.get(f"{owner}_scales")
            fits = entry.dtype == "U8" and len(entry.shape) == 4 and entry.shape[3] == 16
            if not fits or scales is None or scales.dtype != "U8" or scales.shape != entry.shape[:3]:
                raise refused(where, name, "blocks of 16 bytes with a scale for each of them")
            experts, out, groups, _ = entry.shape
            packed[owner] = cls(owner, (experts, groups * 32, out), [name, f"{owner}_scales"], 2)
        return packed

    def unpack(self, raw: Raw) -> torch.Tensor:
        import torch

        blocks, scales = (raw(part) for part in self.parts)
        table = torch.tensor(_FP4, dtype=torch.bfloat16)
        stack = torch.empty(self.shape, dtype=torch.bfloat16)
        for expert in range(len(blocks)):
            codes = torch.stack((blocks[expert] & 15, blocks[expert] >> 4), dim=-1).flatten(-2)
            numbers = torch.ldexp(table[codes.long()], (scales[expert].int() - 127)[..., None])
            stack[expert] = numbers.flatten(1).T
        return stack


def refused(where: object, name: str, expected: str) -> InputError:
    """The refusal of a stored tensor, or of the config's `quantization_config`."""
    if name == "quantization_config":
        return InputError(
            "model.base_model", f"{where}/config.json", f"a quantization_config with {expected}"
        )
    return InputError(f"checkpoint {name if len(name) <= 120 else name[:117] + '...'}", where, expected)
