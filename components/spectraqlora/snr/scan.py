"""The SNR table of a checkpoint or of any stream of matrices, as many at a time as memory allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import pandas as pd
import torch

from spectraqlora.artifacts import LinearModule
from spectraqlora.errors import InputError
from spectraqlora.models.modules import module_identity
from spectraqlora.models.tensors import Tensors
from spectraqlora.snr.gram import bfloat16_units
from spectraqlora.snr.journal import Row, ScanJournal
from spectraqlora.snr.marchenko_pastur import calibrated
from spectraqlora.snr.table import order, percentiles
from spectraqlora.snr.workers import Measured, measured

Report = Callable[[int, int, str], None]
"""Called with the matrices done, the matrices in all and the module that was measured last."""

_LEFT_BY_LIBRARIES = 150 * 2**20
"""Bytes: of 600 MB, interpreter and libraries take 310, and 420 where packed weights need bitsandbytes."""
_TIMES_LARGEST = 6


class _Matrix(NamedTuple):
    """A module, the tensor that holds its weight, and which expert where the tensor is fused."""

    module: str
    tensor: str
    expert: int | None


def scan_tensors(
    stream: Iterable[tuple[str, torch.Tensor]], source: str = "original", ties: str = "spectrum"
) -> pd.DataFrame:
    """The SNR table of (module, weight) pairs; a 3-D weight (experts x out x in) gives a row per expert."""
    modules: list[str] = []

    def matrices() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stream:
            experts = enumerate(tensor) if tensor.ndim == 3 else [(None, tensor)]
            for index, weight in experts:
                modules.append(_module(name, index))
                yield modules[-1], weight

    rows = {result.module: _row(result, source) for result in measured(matrices())}
    return _table([rows[module] for module in modules], ties)


def scan(
    checkpoint: Tensors,
    modules: Sequence[LinearModule] | None = None,
    report: Report | None = None,
    journal: ScanJournal | None = None,
    ties: str = "spectrum",
) -> pd.DataFrame:
    """The SNR table of a checkpoint: of the modules asked for, or of all matrices inside numbered layers.

    Peak resident memory stays below 600 MB plus six times the largest matrix, whatever the model's size.

    Args:
        checkpoint: original or packed in 4 bits; the table's `source` says which.
        modules: modules as the loaded model names them.
        report: called at the start and after each matrix.
        journal: rows of an interrupted scan, which are not measured again; it gets each new row.
        ties: the setting `snr.ties`.

    Raises:
        InputError: no matrix at all, or one of `modules` is not in the checkpoint.
    """
    plan = _plan(checkpoint, modules)
    rows = dict(journal.rows) if journal else {}
    missing = [matrix for matrix in plan if matrix.module not in rows]
    before = len(plan) - len(missing)
    if report:
        report(before, len(plan), "")
    stream = ((matrix.module, checkpoint.load(matrix.tensor, matrix.expert)) for matrix in missing)
    largest = max((checkpoint.matrix_bytes(matrix.tensor) for matrix in plan), default=0)
    with bfloat16_units():
        for done, result in enumerate(measured(stream, memory_budget(largest)), before + 1):
            row = _row(result, "quantized" if checkpoint.packed else "original")
            rows[result.module] = row
            if journal:
                journal.add(row)
            if report:
                report(done, len(plan), result.module)
    return _table([rows[matrix.module] for matrix in plan], ties)


def memory_budget(largest: int) -> int:
    """Bytes that matrices in work may take together in a scan whose largest matrix has `largest` bytes."""
    return _LEFT_BY_LIBRARIES + _TIMES_LARGEST * largest


def tensors_of(checkpoint: Tensors, modules: Sequence[LinearModule]) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, weight out x in) of the modules asked for, from a model's original checkpoint."""
    asked = {m.module: m for m in modules}
    for matrix in _plan(checkpoint, modules):
        if matrix.module in asked:
            weight = checkpoint.load(matrix.tensor, matrix.expert)
            yield matrix.module, weight.T if asked[matrix.module].transposed else weight


def _plan(checkpoint: Tensors, modules: Sequence[LinearModule] | None) -> list[_Matrix]:
    """What to measure, by layer; next to the modules asked for also experts, which are no modules of their own.

    A checkpoint may lack the prefix under which the model holds its blocks.
    """
    names = set(checkpoint.names())
    wanted: list[tuple[str, str]] = []
    if modules is None:
        for name in checkpoint.names():
            stem = name.removesuffix(".weight")
            if _is_matrix(name, checkpoint.shape(name)) and module_identity(stem):
                wanted.append((stem, name))
        wanted.sort(key=lambda pair: (module_identity(pair[0]), pair[0]))
    else:
        for info in modules:
            parts = info.module.split(".")
            candidates = [".".join(parts[start:]) + ".weight" for start in range(len(parts))]
            candidates = [info.tensor, *candidates] if info.tensor else candidates
            match = next((c for c in candidates if c in names and module_identity("." + c)), None)
            if match is None:
                raise InputError(
                    "checkpoint", info.module, "a tensor of that module in the safetensors shards"
                )
            wanted.append((info.module, match))
        taken = {name for _, name in wanted}
        wanted += [
            (name.removesuffix(".weight"), name)
            for name in checkpoint.names()
            if _is_matrix(name, checkpoint.shape(name))
            and (".experts." in name or len(checkpoint.shape(name)) == 3)
            and name not in taken
        ]
    plan = []
    for stem, name in wanted:
        shape = checkpoint.shape(name)
        experts: Iterable[int | None] = range(shape[0]) if len(shape) == 3 else [None]
        plan += [_Matrix(_module(stem, index), name, index) for index in experts]
    return plan


_NO_MATRIX = re.compile(
    r"(^|\.)(\w*bias|\w*conv\w*|A_log|D|\w*rotary\w*|\w*norm\w*|\w*router\w*|gate|shared_expert_gate)(\.|$)"
)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix, or a stack of experts' matrices.

    Convolutions, routers and what state-space layers store beside their projections are none, whatever their shape; of
    three axes, fused experts alone are taken as matrices.
    """
    if _NO_MATRIX.search(name) or 0 in shape:
        return False
    return len(shape) == 2 or (len(shape) == 3 and ("expert" in name or "_moe." in name))


def _module(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}[{expert}]"


def _row(result: Measured, source: str) -> Row:
    layer, kind = module_identity(result.module.partition("[")[0]) or (-1, result.module)
    statistics, (rows, cols) = result.statistics, result.shape
    return {
        "module": result.module,
        "layer": layer,
        "type": kind,
        "rows": rows,
        "cols": cols,
        "s1": statistics.s1,
        "threshold": statistics.threshold,
        "signal": statistics.signal,
        "noise": statistics.noise,
        "snr": statistics.snr,
        "calibrated": calibrated(statistics, rows, cols, result.entry_std),
        "above": statistics.above,
        "source": source,
    }


def _table(rows: list[Row], ties: str) -> pd.DataFrame:
    if not rows:
        raise InputError("model", "no weight", "matrices inside numbered layers")
    table = pd.DataFrame(rows)
    table.insert(len(table.columns) - 1, "order", order(table, ties))
    table.insert(len(table.columns) - 1, "percentile", percentiles(table))
    return table
