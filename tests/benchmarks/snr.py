"""SNR scan: speed against the routines that Spectrum and Soup run, and peak memory on a large checkpoint.

python -m tests.benchmarks.snr                  Llama-3.2-1B shapes on the CPU
python -m tests.benchmarks.snr --gpu            Llama-3-8B shapes on the GPU
python -m tests.benchmarks.snr --memory-gb 10   peak resident memory of scanning a synthetic checkpoint
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.snr.gram import bfloat16_units
from spectraqlora.snr.marchenko_pastur import from_singular_values
from spectraqlora.snr.scan import memory_budget, scan
from spectraqlora.snr.workers import measured

Shape = tuple[int, int]
LLAMA_1B: list[Shape] = [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)]
"""q and o, k and v, gate and up, down of one layer."""
LLAMA_8B: list[Shape] = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]


def weight_like(shape: Shape, seed: int) -> torch.Tensor:
    """A bfloat16 matrix with a bulk of noise and a few directions about ten times stronger."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = shape
    strong = torch.randn(rows, 8, generator=generator) @ torch.randn(8, cols, generator=generator)
    noise = torch.randn(shape, generator=generator)
    return (0.02 * (noise + 10 / min(shape) ** 0.5 * strong)).bfloat16()


def _seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speed(layer: list[Shape], layers: int, device: str) -> None:
    """Print seconds per shape and in all; ours once more on the whole mix, as a scan meets it."""
    console = Console(width=110)
    references: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"svdvals": torch.linalg.svdvals}
    if device == "cpu":
        references["numpy"] = lambda w: torch.from_numpy(np.linalg.svd(w.numpy(), compute_uv=False))
    shapes = layer * layers
    weights = [(str(index), weight_like(shape, index)) for index, shape in enumerate(shapes)]
    # The memory that a scan of such a checkpoint allows itself.
    budget = memory_budget(max(2 * rows * cols for rows, cols in layer))
    # Both sides do their work once on a small matrix first: libraries load, threads start.
    for reference in references.values():
        reference(torch.randn(256, 512, device=device))
    list(measured([("warm", torch.randn(256, 512))]))

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"Seconds for the matrices of {layers} layers, {where}; references in float32")
    for column in ("shape", "matrices", "ours", *references, *(f"{name} / ours" for name in references)):
        table.add_column(column, justify="right")
    totals = dict.fromkeys(references, 0.0)
    difference = 0.0
    for shape in dict.fromkeys(shapes):
        group = [pair for pair in weights if tuple(pair[1].shape) == shape]
        found: dict[str, float] = {}

        def ours(group: list[tuple[str, torch.Tensor]] = group, into: dict[str, float] = found) -> None:
            with bfloat16_units():
                into.update({result.module: result.statistics.snr for result in measured(group, budget)})

        own = _seconds(ours)
        spent = dict.fromkeys(references, 0.0)
        for module, weight in group:
            single = weight.float().to(device)
            for name, reference in references.items():
                start = time.perf_counter()
                values = reference(single).cpu()
                spent[name] += time.perf_counter() - start
                expected = from_singular_values(values, shape).snr
                if found[module] != expected:
                    difference = max(difference, abs(found[module] / expected - 1))
        for name in references:
            totals[name] += spent[name]
        _add(table, f"{shape[0]}x{shape[1]}", len(group), own, spent)
    table.add_section()
    with bfloat16_units():
        _add(table, "all, mixed", len(weights), _seconds(lambda: list(measured(weights, budget))), totals)
    without = _seconds(lambda: list(measured(weights, budget)))
    _add(table, "without bfloat16 units", len(weights), without, totals)
    console.print(table)
    console.print(f"Largest relative difference of an snr from a float32 reference: {difference:.1e}")


def _add(table: Table, label: str, count: int, own: float, spent: dict[str, float]) -> None:
    seconds = [f"{value:.2f}" for value in (own, *spent.values())]
    table.add_row(label, str(count), *seconds, *(f"{value / own:.1f}" for value in spent.values()))


def write_checkpoint(folder: Path, size: int, layer: list[Shape], shard_size: int = 2**31) -> None:
    """A bfloat16 checkpoint of at least `size` bytes: layers of random matrices, in shards.

    One draw per shape is written again in every layer: only memory is measured.
    """
    content = {
        shape: weight_like(shape, 0).view(torch.int16).numpy().tobytes() for shape in dict.fromkeys(layer)
    }
    names = ("self_attn.q_proj", "self_attn.o_proj", "self_attn.k_proj", "self_attn.v_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    per_layer = sum(len(content[shape]) for shape in layer)
    per_shard = max(1, shard_size // per_layer)
    layers = -(-size // per_layer)
    where = {}
    for first in range(0, layers, per_shard):
        shard = f"model-{first:05d}.safetensors"
        entries = [
            (f"model.layers.{index}.{name}.weight", shape)
            for index in range(first, min(layers, first + per_shard))
            for name, shape in zip(names, layer, strict=True)
        ]
        header, offset = {}, 0
        for name, shape in entries:
            end = offset + len(content[shape])
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            where[name] = shard
            offset = end
        encoded = json.dumps(header).encode()
        with open(folder / shard, "wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            for _, shape in entries:
                stream.write(content[shape])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def scan_and_print_peak(folder: Path) -> None:
    """Scan a checkpoint and print {matrices, seconds, peak} (bytes resident) as JSON."""
    start = time.perf_counter()
    table = scan(LocalTensors(folder))
    seconds = time.perf_counter() - start
    print(json.dumps({"matrices": len(table), "seconds": seconds, "peak": _peak_resident()}))


def _peak_resident() -> int:
    """Bytes. Linux counts into ru_maxrss what the parent held when it started this process; VmHWM does not."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of_scan(folder: Path) -> dict[str, float]:
    """What `scan_and_print_peak` prints in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.snr", "--scan", str(folder)]
    root = Path(__file__).resolve().parents[2]
    printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    measured_: dict[str, float] = json.loads(printed.splitlines()[-1])
    return measured_


def memory_bound(layer: list[Shape]) -> int:
    """Bytes: 600 MB plus six times the largest bfloat16 matrix."""
    return 600 * 10**6 + 6 * max(2 * rows * cols for rows, cols in layer)


def memory(gigabytes: float) -> None:
    """Print the peak of scanning a synthetic checkpoint against the bound."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, int(gigabytes * 2**30), LLAMA_1B)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = peak_of_scan(folder)
    print(
        f"{size / 2**30:.2f} GiB checkpoint, {found['matrices']:.0f} matrices in {found['seconds']:.0f} s: "
        f"peak resident {found['peak'] / 2**20:.0f} MiB, bound {memory_bound(LLAMA_1B) / 2**20:.0f} MiB"
    )


def main() -> None:
    """Run the part that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="Llama-3-8B shapes on the GPU")
    parser.add_argument("--layers", type=int, default=2, help="layers' worth of matrices (default 2)")
    parser.add_argument("--memory-gb", type=float, help="size of the synthetic checkpoint to scan")
    parser.add_argument("--scan", type=Path, help="only scan this folder and print its peak as JSON")
    arguments = parser.parse_args()
    if arguments.scan:
        scan_and_print_peak(arguments.scan)
    elif arguments.memory_gb:
        memory(arguments.memory_gb)
    elif not arguments.gpu:
        speed(LLAMA_1B, arguments.layers, "cpu")
    elif torch.cuda.is_available():
        speed(LLAMA_8B, arguments.layers, "cuda")
    else:
        parser.error("--gpu: no CUDA device here")


if __name__ == "__main__":
    main()
