"""How much memory every step takes, from a model's config and the settings alone.

With a GPU the figures are allocations on it, and what its host needs in addition; without one all of it is main memory.
Steps that keep no model in memory and measure nothing (prepare-data, compare, register, promote) are not planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import psutil
import torch

from spectraqlora.artifacts import LinearModule
from spectraqlora.methods.catalogue import method as method_of
from spectraqlora.models.hardware import compute_dtype
from spectraqlora.models.modules import residual_width
from spectraqlora.planning.activations import kept_activations
from spectraqlora.planning.shape import FLOAT32, ModelShape, config_of
from spectraqlora.planning.training import WORKSPACES, surrogate_map, training
from spectraqlora.settings import Settings

GIB = 2**30
GPU_RESERVE_BYTES = 600 * 2**20
"""CUDA context and libraries on the device."""
GPU_RESERVE_SHARE = 0.05
"""Of the device, for fragmentation of its memory."""
PROCESS_BYTES = (940 if torch.version.cuda else 670) * 2**20
"""Resident memory of a step's libraries: once they are imported, MLflow, PEFT and Trainer among them, 574 MiB, or 860 where
torch is built for CUDA; 30 of their code that is read from the disk when it computes; the rest is for other versions."""
CUDA_PROCESS_BYTES = 3 * GIB
"""The same where CUDA's libraries are loaded."""
_SCAN_BYTES = 600 * 2**20
"""Of the SNR scan, in addition to six times its largest matrix (see snr.scan)."""
_SHARD_BYTES = 50 * 10**9
"""Most that transformers writes into one file, and holds in main memory for it."""


@dataclass(frozen=True)
class StepMemory:
    """What one step takes at its peak, bytes."""

    step: str
    method: str
    """Empty where all methods share the step."""
    device: int
    """On the GPU where there is one, else in main memory."""
    host: int
    """In main memory, where a GPU holds the rest."""
    largest: str
    """What takes most of it."""

    @property
    def label(self) -> str:
        """The step, with its method where it has one."""
        return f"{self.step} ({self.method})" if self.method else self.step


@dataclass(frozen=True)
class Plan:
    """Memory of all steps of a run, in their order."""

    shape: ModelShape
    settings: Settings
    cuda: bool
    steps: tuple[StepMemory, ...]


@dataclass(frozen=True)
class _Run:
    """What a step's memory depends on."""

    shape: ModelShape
    settings: Settings
    cuda: bool

    @property
    def process(self) -> int:
        """Main memory of a process that computes on a GPU; 0 without one, where all is one memory."""
        return CUDA_PROCESS_BYTES if self.cuda else 0

    def with_holes(self, size: int) -> int:
        """Memory of tensors that come and go, with what the allocator loses between them; a GPU's is without.

        Half as many holes as blocks, none larger than those: Knuth's fifty-percent rule (The Art of Computer
        Programming, 2.5).
        """
        return size if self.cuda else size * 3 // 2

    def peak(self, step: str, method: str, parts: Mapping[str, int], host: int = 0) -> StepMemory:
        """A step that computes: the sum of its parts on the GPU and `host` in main memory, or all in one memory."""
        idle = WORKSPACES if self.cuda else PROCESS_BYTES
        return StepMemory(
            step,
            method,
            device=idle + sum(parts.values()),
            host=self.process + host,
            largest=max(parts, key=lambda name: parts[name]),
        )

    def on_host(self, step: str, method: str, size: int, largest: str) -> StepMemory:
        """A step that needs no GPU."""
        return StepMemory(step, method, 0 if self.cuda else size, size if self.cuda else 0, largest)


def plan_for(source: str, settings: Settings, gpu_bytes: int) -> tuple[Plan, int]:
    """The plan of a run with the base model `source`, and the bytes that a step has.

    Args:
        source: name of a shape, model folder, or hub id.
        settings: of the run.
        gpu_bytes: memory of the GPU; 0 is none, and steps have this machine's main memory.

    Raises:
        InputError: as `config_of` and `ModelShape`.
    """
    planned = plan(shape_of(source, settings, gpu_bytes > 0), settings, cuda=gpu_bytes > 0)
    return planned, available(gpu_bytes) if gpu_bytes else int(psutil.virtual_memory().total)


def shape_of(source: str, settings: Settings, cuda: bool) -> ModelShape:
    """The base model `source` in the type that the settings compute in, with a GPU or without.

    Where that depends on a GPU that is not here, it is one that has bfloat16.

    Raises:
        InputError: as `config_of` and `ModelShape`.
    """
    choice: str = settings.model.compute_dtype
    if choice == "auto" and not cuda:
        choice = "float32"
    elif choice == "auto":
        here = torch.cuda.is_available()
        choice = str(compute_dtype("auto")).removeprefix("torch.") if here else "bfloat16"
    config = config_of(source, settings.model.revision, settings.model.trust_remote_code)
    return ModelShape(config, choice)


def plan(shape: ModelShape, settings: Settings, cuda: bool) -> Plan:
    """Memory of every step and method.

    Args:
        shape: of the base model.
        settings: of the run.
        cuda: whether steps run on a GPU.
    """
    names = [(step, "") for step in ("quantize-load", "snr-analyze", "measure-base")]
    for method in settings.methods:
        names += [(step, method) for step in ("select-layers", "train", "re-evaluate")]
    names.append(("merge-export", ""))
    steps = tuple(step_memory(shape, settings, cuda, step, method) for step, method in names)
    return Plan(shape, settings, cuda, steps)


def available(device_bytes: int) -> int:
    """What a GPU of that size has for a step's tensors."""
    return int(device_bytes * (1 - GPU_RESERVE_SHARE)) - GPU_RESERVE_BYTES


def step_memory(shape: ModelShape, settings: Settings, cuda: bool, step: str, method: str) -> StepMemory:
    """Memory of one step; `method` is empty where all methods share it."""
    return _STEPS[step](_Run(shape, settings, cuda), method)


def _quantize_load(run: _Run, method: str) -> StepMemory:
    shape = run.shape
    parts = {
        "4-bit weights": shape.weight_bytes,
        "largest tensor": 2 * shape.dtype_bytes * shape.largest_tensor,
    }
    written = min(shape.weight_bytes, _SHARD_BYTES) if run.cuda else 0
    return run.peak("quantize-load", method, parts, host=written)


def _snr_analyze(run: _Run, method: str) -> StepMemory:
    scan = _SCAN_BYTES + 6 * FLOAT32 * run.shape.largest
    return run.on_host("snr-analyze", method, scan, "largest matrices")


def _measure_base(run: _Run, method: str) -> StepMemory:
    # One after the other: the score, and the gradients where a method needs them.
    turns = {"evaluation": run.with_holes(scoring(run.shape, run.settings, run.cuda))}
    if any(method_of(name).measures_gradients(run.settings.select) for name in run.settings.methods):
        turns["gradients"] = run.with_holes(sum(calibration(run.shape, run.settings, run.cuda).values()))
    return run.peak("measure-base", method, {"4-bit weights": run.shape.weight_bytes, **_largest(turns)})


def _select_layers(run: _Run, method: str) -> StepMemory:
    select = run.settings.select
    sketches = 0
    if method_of(method).measures_gradients(select):
        # Of every module what it has of its sides, and the square (k x k).
        squares = (
            min(select.sketch_size, m.in_features) * min(select.sketch_size, m.out_features)
            for m in run.shape.modules
        )
        sketches = FLOAT32 * (_sketched_sides(run.shape.modules, select.sketch_size) + sum(squares))
    largest = "sketches" if sketches > PROCESS_BYTES else "libraries"
    return run.on_host("select-layers", method, PROCESS_BYTES + sketches, largest)


def _train(run: _Run, method: str) -> StepMemory:
    memory = training(run.shape, surrogate_map(method, run.shape, run.settings), run.settings, run.cuda)
    fixed = memory.weights + memory.trained + memory.workspaces
    scored = run.with_holes(scoring(run.shape, run.settings, run.cuda))
    passing = run.with_holes(memory.total - fixed)
    parts = {"4-bit weights": memory.weights, "adapters, gradients, optimizer": memory.trained}
    if passing >= scored:
        parts["activations and loss"] = passing
    else:
        parts["evaluation"] = scored
    return run.peak("train", method, parts, host=memory.adapters)


def _re_evaluate(run: _Run, method: str) -> StepMemory:
    shape, settings = run.shape, run.settings
    # One after the other: scoring, the updated weights in float32, gradients where they move the next round's ranks.
    updated = (FLOAT32 + shape.dtype_bytes) * shape.largest
    turns = {"evaluation": run.with_holes(max(scoring(shape, settings, run.cuda), updated))}
    if method_of(method).moves and settings.select.needs_gradients and settings.rounds > 1:
        turns["gradients"] = run.with_holes(sum(calibration(shape, settings, run.cuda).values()))
    sides = {m.module: m.in_features + m.out_features for m in shape.modules}
    ranks = surrogate_map(method, shape, settings).active()
    parts = {
        "4-bit weights": shape.weight_bytes,
        "adapters": FLOAT32 * sum(entry.rank * sides[entry.module] for entry in ranks),
        **_largest(turns),
    }
    return run.peak("re-evaluate", method, parts)


def _merge_export(run: _Run, method: str) -> StepMemory:
    shape = run.shape
    parts = {"merged weights": shape.plain_bytes}
    # Beside the plain model, one after the other: the original's mapped file with the tensor that is being converted
    # to the compute type, and the 4-bit weights that are copied into it with what scoring takes.
    scored = run.with_holes(scoring(shape, run.settings, run.cuda))
    four_bit = {"4-bit weights": shape.weight_bytes, "evaluation": scored}
    mapped = 0 if run.cuda else shape.stored_bytes * (shape.parameters + shape.largest_tensor)
    parts |= four_bit if sum(four_bit.values()) >= mapped else {"original weights": mapped}
    written = min(shape.plain_bytes, _SHARD_BYTES) if run.cuda else 0
    return run.peak("merge-export", method, parts, host=written)


_STEPS: dict[str, Callable[[_Run, str], StepMemory]] = {
    "quantize-load": _quantize_load,
    "snr-analyze": _snr_analyze,
    "measure-base": _measure_base,
    "select-layers": _select_layers,
    "train": _train,
    "re-evaluate": _re_evaluate,
    "merge-export": _merge_export,
}


def _largest(turns: dict[str, int]) -> dict[str, int]:
    """The largest of parts that follow one another."""
    name = max(turns, key=lambda name: turns[name])
    return {name: turns[name]}


def scoring(shape: ModelShape, settings: Settings, cuda: bool) -> int:
    """Working memory of scoring rows or generating answers; both keep every layer's keys and values."""
    rows, longest = settings.evaluate.batch_size, shape.row_tokens(settings)
    tokens = longest + (settings.evaluate.max_new_tokens if settings.evaluate.accuracy_rows else 0)
    positions = rows * longest
    return shape.working(positions) + shape.loss(positions, cuda) + shape.past(rows, tokens)


def _sketched_sides(modules: list[LinearModule], size: int) -> int:
    """Numbers of the sides' sketches: in x k of every module, out x k where it writes into the residual stream."""
    width = residual_width(modules)
    inputs = sum(m.in_features * min(size, m.out_features) for m in modules)
    return inputs + sum(width * min(size, m.in_features) for m in modules if m.out_features == width)


def calibration(shape: ModelShape, settings: Settings, cuda: bool) -> dict[str, int]:
    """Gradients of every module, sketched: what takes memory at the peak (see signals.gradients).

    The backward pass starts at the model's own loss, whose logits are gone when it runs the first block again.
    """
    rows, tokens = settings.select.calibration_rows, shape.row_tokens(settings)
    side = settings.select.sketch_size
    logits = 3 * FLOAT32 + (FLOAT32 if shape.dtype_bytes == 2 else 0)
    kept, block = _watched(shape, rows, tokens, not settings.data.pack, cuda)
    return {
        "activations": kept,
        "sketches": 2 * FLOAT32 * _sketched_sides(shape.modules, side),
        "working set": shape.working(rows * tokens),
        **_largest({"logits": rows * tokens * shape.vocabulary * logits, "recomputed block": block}),
    }


@lru_cache(maxsize=32)
def _watched(shape: ModelShape, rows: int, tokens: int, padded: bool, cuda: bool) -> tuple[int, int]:
    """What a forward pass keeps whose modules' inputs are watched, and what the largest block adds on running again."""
    from spectraqlora.signals.gradients import watch

    model = shape.build()
    modules = {info.module for info in shape.modules}
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name in modules:
            watch(module, lambda *_: None)
    return kept_activations(model, rows, tokens, padded, cuda).with_recomputation(1)
