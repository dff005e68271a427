"""Measuring a stream of matrices on the step's cores, or in batches on the GPU, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass

import torch

from spectraqlora.runtime.threads import bound_threads
from spectraqlora.snr.gram import CHUNK
from spectraqlora.snr.marchenko_pastur import SnrStatistics, batch_statistics, entry_std, shape_of, statistics

Weights = Iterable[tuple[str, torch.Tensor]]
"""(module, n x m weight) pairs."""
DEFAULT_BUDGET = 2**30
_GPU_BATCH = 8
_KEPT_BY_THREAD = 40 * 2**20
"""Bytes, as measured with glibc and MKL."""


@dataclass(frozen=True)
class Measured:
    """One measured matrix; `entry_std` is the standard deviation of its entries."""

    module: str
    shape: tuple[int, int]
    entry_std: float
    statistics: SnrStatistics


def measured(weights: Weights, budget: int = DEFAULT_BUDGET) -> Iterator[Measured]:
    """Statistics of every matrix, in the order in which they get done.

    Args:
        weights: taken one after the other, as room becomes free.
        budget: bytes of host memory that the matrices in work may take together (`working_bytes`); one
            matrix is always in work.
    """
    if torch.cuda.is_available():
        return in_batches(weights, torch.device("cuda"))
    return in_threads(weights, budget, bound_threads())


def working_bytes(weight: torch.Tensor) -> int:
    """Host memory while one matrix is measured: itself, its Gram matrix twice and a chunk in float64.

    To that comes what LAPACK and the allocator keep for each thread.
    """
    side = min(weight.shape)
    return weight.numel() * weight.element_size() + 8 * side * (2 * side + CHUNK) + _KEPT_BY_THREAD


def in_threads(weights: Weights, budget: int, cores: int) -> Iterator[Measured]:
    """One matrix per core while `budget` has room for so many, else fewer with more threads each.

    The eigenvalue routine scales badly over threads, and releases Python's lock: matrices side by side
    keep all cores busy.
    """
    running: dict[Future[Measured], int] = {}
    try:
        with ThreadPoolExecutor(cores) as pool:
            for module, weight in weights:
                cost = working_bytes(weight)
                while running and (len(running) == cores or sum(running.values()) + cost > budget):
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        yield future.result()
                side_by_side = max(1, min(cores, budget // cost))
                running[pool.submit(_measure, module, weight, cores // side_by_side)] = cost
                del weight
            for future in as_completed(list(running)):
                yield future.result()
    finally:
        # Threads started later would take over the number that a worker set last.
        torch.set_num_threads(cores)


def _measure(module: str, weight: torch.Tensor, threads: int) -> Measured:
    torch.set_num_threads(threads)
    return Measured(module, shape_of(weight), entry_std(weight), statistics(weight))


def in_batches(weights: Weights, device: torch.device) -> Iterator[Measured]:
    """Up to `_GPU_BATCH` matrices of equal shape in one call on `device`."""
    waiting: dict[tuple[int, int], list[tuple[str, torch.Tensor]]] = {}
    for module, weight in weights:
        batch = waiting.setdefault(shape_of(weight), [])
        batch.append((module, weight.to(device)))
        if len(batch) == _GPU_BATCH:
            yield from _batch(waiting.pop(shape_of(weight)))
    for batch in waiting.values():
        yield from _batch(batch)


def _batch(batch: list[tuple[str, torch.Tensor]]) -> Iterator[Measured]:
    results = batch_statistics([weight for _, weight in batch])
    for (module, weight), result in zip(batch, results, strict=True):
        yield Measured(module, shape_of(weight), entry_std(weight), result)
