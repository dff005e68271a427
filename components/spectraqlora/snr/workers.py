"""Measuring a stream of matrices on the step's cores within a budget of memory, or one after the other on the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass

import torch

from spectraqlora.runtime.threads import bound_threads
from spectraqlora.snr.gram import CHUNK
from spectraqlora.snr.marchenko_pastur import SnrStatistics, entry_std, shape_of, statistics

Weights = Iterable[tuple[str, torch.Tensor]]
"""(module, n x m weight) pairs."""
DEFAULT_BUDGET = 2**30
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
    """Statistics of every matrix, in the order in which they get done; on the GPU where there is one.

    Args:
        weights: taken one after the other, as room becomes free.
        budget: bytes of host memory that the matrices in work may take together (`working_bytes`); one
            matrix is always in work.
    """
    if torch.cuda.is_available():
        return (_measured(module, weight.cuda()) for module, weight in weights)
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
    before = torch.get_num_threads()
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
        torch.set_num_threads(before)


def _measure(module: str, weight: torch.Tensor, threads: int) -> Measured:
    torch.set_num_threads(threads)
    return _measured(module, weight)


def _measured(module: str, weight: torch.Tensor) -> Measured:
    return Measured(module, shape_of(weight), entry_std(weight), statistics(weight))
