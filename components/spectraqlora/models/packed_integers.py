"""compressed-tensors' pack-quantized weights: codes of 4 or 8 bits in int32 words (W4A16, W8A16 of llm-compressor)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectraqlora.models.headers import Entry
from spectraqlora.models.packings import Packing, Raw, refused

if TYPE_CHECKING:
    import torch

_CODES, _SCALE, _ZERO, _SHAPE, _GROUPS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)
_BITS = (4, 8)


class PackQuantized(Packing):
    """A matrix (out x in): W = (code - zero) · scale of each row and group of columns.

    Codes are stored plus half their range, least significant first, along columns; zeros are as well, along rows. Without
    zeros they are 0. `weight_g_idx` says which group a column is of, where groups are not neighbours.

    Source: `compressed_tensors.compressors.pack_quantized` of the package compressed-tensors.
    """

    bits: int

    @classmethod
    def all_of(cls, entries: Mapping[str, Entry], raw: Raw, where: object) -> dict[str, Packing]:
        """Every matrix of a checkpoint that is stored so, by the tensor's name that it stands for.

        Raises:
            InputError: parts are missing, or do not fit together.
        """
        packed: dict[str, Packing] = {}
        for name in entries:
            if not name.endswith(f".{_CODES}"):
                continue
            stem = name.removesuffix(_CODES)
            for part in (stem + _SCALE, stem + _SHAPE):
                if part not in entries:
                    raise refused(where, part, f"a tensor; {name} cannot be read without it")
            extra = [stem + part for part in (_ZERO, _GROUPS) if stem + part in entries]
            shape = _shape(entries[stem + _SHAPE], stem + _SHAPE, raw, where)
            packing = cls(f"{stem}weight", shape, [name, stem + _SCALE, stem + _SHAPE, *extra])
            packing.bits = _bits(entries, packing, where)
            packed[packing.name] = packing
        return packed

    def unpack(self, raw: Raw) -> torch.Tensor:
        """The matrix in float32."""
        import torch

        parts = {part.rpartition(".")[2]: raw(part) for part in self.parts}
        rows, cols = self.shape
        weight = _codes(parts[_CODES], self.bits)[:, :cols].float()
        scale = parts[_SCALE].float().reshape(rows if parts[_SCALE].numel() > 1 else 1, -1)
        groups = scale.shape[1]
        group = parts[_GROUPS].long() if _GROUPS in parts else torch.arange(cols) // (cols // groups)
        if int(group.min()) < 0 or int(group.max()) >= groups:
            raise refused("checkpoint", self.parts[-1], f"groups below {groups}")
        if _ZERO in parts:
            zero = _codes(parts[_ZERO].T.contiguous(), self.bits).T[:rows]
            weight.sub_(zero.float()[:, group])
        return weight.mul_(scale[:, group])


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes in int32 words (rows x words), unpacked along the columns, as int16."""
    import torch

    pieces = [((words >> (bits * place)) & (2**bits - 1)).to(torch.int16) for place in range(32 // bits)]
    return torch.stack(pieces, dim=-1).flatten(-2).sub_(2 ** (bits - 1))


def _shape(entry: Entry, name: str, raw: Raw, where: object) -> tuple[int, int]:
    sides = [int(side) for side in raw(name).flatten().tolist()] if entry.numbers == 2 else []
    if len(sides) != 2 or not all(0 < side < 1 << 32 for side in sides):
        raise refused(where, name, "the two sides of a matrix")
    return sides[0], sides[1]


def _bits(entries: Mapping[str, Entry], packing: PackQuantized, where: object) -> int:
    """Bits of a code, after all parts' shapes were held against the matrix's."""
    rows, cols = packing.shape
    parts = {part.rpartition(".")[2]: entries[part] for part in packing.parts}
    codes, scale = parts[_CODES], parts[_SCALE]
    for bits in _BITS:
        groups = scale.numbers // rows if scale.numbers > 1 else 1
        fits = codes.dtype == "I32" and codes.shape == (rows, _words(cols, bits))
        fits = fits and 0 < groups <= cols and scale.numbers in (1, rows * groups)
        if _ZERO in parts:
            zero = parts[_ZERO]
            fits = fits and zero.dtype == "I32" and zero.shape == (_words(rows, bits), groups)
        fits = fits and (parts[_GROUPS].shape == (cols,) if _GROUPS in parts else cols % groups == 0)
        if fits:
            return bits
    shapes = {name: list(entry.shape) for name, entry in parts.items() if name != _SHAPE}
    raise refused(
        where, packing.parts[0], f"codes of 4 or 8 bits of a {rows}x{cols} matrix, with scales and zeros that fit "
        f"them; the shapes are {shapes}"
    )  # fmt: skip


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // 32)
