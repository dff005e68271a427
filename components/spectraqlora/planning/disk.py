"""How much disk every step takes, from a model's shapes and the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from spectraqlora.methods.catalogue import method as method_of
from spectraqlora.planning.shape import FLOAT32, ModelShape
from spectraqlora.planning.training import surrogate_map
from spectraqlora.settings import Settings

TEXTS_BYTES = 32 * 2**20
"""Tokenizer, configs, manifests of a model's folder."""
_ROWS_PER_BYTE = 4
"""Bytes of prepared rows for each byte of their file: ids and labels of about every third character."""
_SNAPSHOT = 4
"""A checkpoint's numbers for each of the adapters': themselves, the best so far, two moments."""


@dataclass(frozen=True)
class StepDisk:
    """What one step writes, of all methods that have it, bytes."""

    step: str
    kept: int
    """In the work directory: artifacts, and what MLflow keeps there."""
    passing: int
    """Besides, while the step runs: in the scratch folder (TMPDIR), checkpoints in the work directory."""
    what: str
    """The largest part of it."""


def disk(shape: ModelShape, settings: Settings, source_bytes: int = 0) -> tuple[StepDisk, ...]:
    """What the steps of a run write, in their order.

    Not counted: the copy of a model at an address or on the hub in the user's cache (`base_bytes`).

    Args:
        shape: of the base model, in the type that it is computed in.
        settings: of the run.
        source_bytes: size of the data, where it is known.
    """
    sides = {m.module: m.in_features + m.out_features for m in shape.modules}
    first = trained = moved = largest = 0
    for name in settings.methods:
        method = method_of(name)
        entries = surrogate_map(name, shape, settings).active()
        adapter = FLOAT32 * sum(entry.rank * sides[entry.module] for entry in entries)
        rounds = settings.rounds if method.moves else 1
        trained += rounds * adapter
        moved += (rounds - 1) * adapter
        first += adapter if method.measures_gradients(settings.select) else 0
        largest = max(largest, adapter)
    exported = base_bytes(shape) + TEXTS_BYTES
    registered = exported if settings.tracking.registered_form == "merged" else 0
    store_here = not settings.tracking.uri or settings.tracking.uri.startswith("sqlite:")
    snapshots = (settings.checkpoint.keep + 1) * _SNAPSHOT * largest
    return (
        StepDisk("quantize-load", shape.weight_bytes + TEXTS_BYTES, 0, "4-bit model"),
        StepDisk("prepare-data", _ROWS_PER_BYTE * source_bytes, 0, "rows"),
        StepDisk("measure-base", _sketches(shape, settings), 0, "gradient sketches"),
        StepDisk("select-layers", first, 0, "first adapters"),
        StepDisk("train", trained, snapshots, "adapters; checkpoints"),
        StepDisk("re-evaluate", moved, 0, "next rounds' adapters"),
        StepDisk("compare", largest, 0, "winner's adapter"),
        StepDisk("merge-export", exported + largest, 0, "merged model"),
        StepDisk("register", (registered + largest) if store_here else 0, registered, "MLflow's copies"),
    )


def most(steps: tuple[StepDisk, ...]) -> int:
    """The most that a run's steps, one after the other, take at once."""
    kept = peak = 0
    for step in steps:
        kept += step.kept
        peak = max(peak, kept + step.passing)
    return peak


def base_bytes(shape: ModelShape) -> int:
    """The base model in the type that its config names, which is that of the export; else in the computed one."""
    return shape.parameters * shape.stored_bytes


def _sketches(shape: ModelShape, settings: Settings) -> int:
    """Of every module its input side's sketch (in x k) and the square one (k x k), where a method measures gradients."""
    if not any(method_of(name).measures_gradients(settings.select) for name in settings.methods):
        return 0
    size = settings.select.sketch_size
    total = 0
    for module in shape.modules:
        outer, inner = min(size, module.out_features), min(size, module.in_features)
        total += outer * (module.in_features + inner)
    return FLOAT32 * total
