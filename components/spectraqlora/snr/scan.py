"""The SNR table of a checkpoint or of any stream of matrices, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch

from spectraqlora.artifacts import LinearModule
from spectraqlora.checkpoint import Checkpoint
from spectraqlora.errors import InputError
from spectraqlora.models import module_identity
from spectraqlora.snr.marchenko_pastur import calibrated, statistics

Report = Callable[[int, int, str], None]


def scan_tensors(stream: Iterable[tuple[str, torch.Tensor]], source: str = "original") -> pd.DataFrame:
    """The SNR table of (module, weight) pairs; a 3-D weight (experts x out x in) gives a row per expert."""
    rows = []
    for name, tensor in stream:
        parts = [(name, tensor)]
        if tensor.ndim == 3:
            parts = [(f"{name}[{index}]", expert) for index, expert in enumerate(tensor)]
        layer, kind = module_identity(name) or (-1, name)
        for module, weight in parts:
            found = statistics(weight)
            shape = (int(weight.shape[0]), int(weight.shape[1]))
            rows.append(
                {
                    "module": module,
                    "layer": layer,
                    "type": kind,
                    "rows": shape[0],
                    "cols": shape[1],
                    "s1": found.s1,
                    "threshold": found.threshold,
                    "signal": found.signal,
                    "noise": found.noise,
                    "snr": found.snr,
                    "calibrated": calibrated(found, *shape, float(weight.double().std())),
                    "above": found.above,
                    "source": source,
                }
            )
    table = pd.DataFrame(rows)
    if table.empty:
        raise InputError("model", "no weight", "matrices inside numbered layers")
    place = table.groupby("type")["snr"].rank(pct=True, method="average") * 100
    table.insert(len(table.columns) - 1, "percentile", place.fillna(0.0))
    return table


def checkpoint_tensors(
    checkpoint: Checkpoint, modules: Sequence[LinearModule] | None, report: Report | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, weight) of the modules asked for, or of every matrix inside numbered layers.

    A checkpoint may lack the prefix under which the loaded model holds its blocks.
    """
    names = set(checkpoint.names())
    wanted: list[tuple[str, str]] = []
    if modules is None:
        for name in checkpoint.names():
            stem = name.removesuffix(".weight")
            if len(checkpoint.shape(name)) >= 2 and module_identity(stem) and not name.endswith(".bias"):
                wanted.append((stem, name))
        wanted.sort(key=lambda pair: (module_identity(pair[0]), pair[0]))
    else:
        for info in modules:
            parts = info.module.split(".")
            candidates = [".".join(parts[start:]) + ".weight" for start in range(len(parts))]
            match = next((c for c in candidates if c in names and module_identity("." + c)), None)
            if match is None:
                raise InputError(
                    "checkpoint", info.module, "a tensor of that module in the safetensors shards"
                )
            wanted.append((info.module, match))
    for index, (module, name) in enumerate(wanted):
        if report:
            report(index, len(wanted), module)
        yield module, checkpoint.load(name)
    if report:
        report(len(wanted), len(wanted), "done")


def tensors_of(folder: Path, modules: Sequence[LinearModule]) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, weight out x in) of a model's linear modules from its original checkpoint."""
    transposed = {m.module for m in modules if m.transposed}
    for name, weight in checkpoint_tensors(Checkpoint(folder), modules):
        yield name, weight.T if name in transposed else weight


def scan(
    checkpoint: Checkpoint, modules: Sequence[LinearModule] | None = None, report: Report | None = None
) -> pd.DataFrame:
    """The SNR table of a checkpoint."""
    return scan_tensors(checkpoint_tensors(checkpoint, modules, report))
