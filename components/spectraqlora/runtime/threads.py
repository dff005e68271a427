"""How many threads a step computes with: as many as the cores that it can count on.

Left alone, torch, MKL and the tokenizers each start a thread for every core that they see, whatever share of
them is the step's. Where two steps do so on the same cores, the threads of one wait for each other while those of
the other work: two trainings on 2 cores took up to 11 times as long as one alone, and with one thread each 1.3 times
(`python -m tests.benchmarks.threads`).

The number of threads changes the order in which sums are taken, and so the last digits of losses and weights:
runs that must be equal to the bit need the same OMP_NUM_THREADS.
"""

from __future__ import annotations

import fcntl
import functools
import math
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

OWN = "OMP_NUM_THREADS"
"""Environment variable with which a user bounds the threads of every process."""
CPUS = "SPECTRAQLORA_CPUS"
"""Environment variable for the whole CPU cores that a step has been promised, by who placed it.

On Kubernetes that is the values' cpu request, or the limit where there is no request (Kubernetes then takes the
limit as request). A request below a limit is what the scheduler guarantees: it is the bound that holds when the
node's other pods work, and the limit is reached at their expense alone.
"""
_FOLLOWING = ("MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def bound_threads() -> int:
    """Bound the threads of this process and of those that it starts; returns the bound.

    Called before torch loads, it works through the environment, which torch, MKL and the tokenizers' pool read
    when they are loaded; afterwards through torch as well. It takes some ten microseconds where nothing has
    changed, so that long work may call it again and again, and follow other steps that come and go.
    """
    count = threads_per_process()
    changed = os.environ.get(OWN) != str(count)
    os.environ[OWN] = str(count)
    for name in _FOLLOWING:
        if name not in _given():
            os.environ[name] = str(count)
    if changed and "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)
    return count


def threads_per_process(processes: int = 1) -> int:
    """Threads for each of a step's processes that compute side by side."""
    given = _given()
    shared = OWN not in given and CPUS not in given
    return thread_count(given, available_cores(), 1 + _neighbours().others() if shared else 1, processes)


def thread_count(given: Mapping[str, str], cores: float, steps: int = 1, processes: int = 1) -> int:
    """The rule: the user's own number, else the promised cores, else this step's part of the machine's.

    Args:
        given: environment variables as the step's starter set them.
        cores: CPU cores that this process may use.
        steps: steps that share these cores, this one included.
        processes: processes of this step that share what the step has.

    Returns:
        Threads of one process, at least 1.
    """
    if own := _whole(given.get(OWN, "")):
        return own
    return max(1, int((_whole(given.get(CPUS, "")) or cores / steps) / processes))


def _whole(text: str) -> int:
    """A number of threads or cores; 0 for what is none."""
    return int(text) if text.isdecimal() else 0


@functools.cache
def _given() -> Mapping[str, str]:
    """The environment before `bound_threads` writes to it."""
    return dict(os.environ)


@functools.cache
def available_cores(root: Path = Path("/")) -> float:
    """CPU cores that this process may use: those of its affinity, or its control group's quota where less.

    Args:
        root: of the file system that holds /proc and /sys.
    """
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), cpu_quota(root))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that the control groups of this process allow, the least of all levels; else infinity.

    Version 2 says it in `cpu.max`, version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`. Inside a container
    the path in /proc/self/cgroup may be that of the host; then the levels that exist here are read.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        level = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        quotas.append(_quota(level))
        for part in path.strip("/").split("/"):
            level /= part
            quotas.append(_quota(level))
    return min(quotas)


def _quota(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / name).read_text(encoding="ascii")
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # None here, or "max".
        return math.inf


class Neighbours:
    """This user's live steps that share the machine's cores: a file for each, locked by its process.

    The system gives up a process's locks at its end, however that comes: a file that can be locked is of a step
    that is no more, and is removed. These locks are not inherited, so that nothing that a step left behind counts.
    Where the folder cannot be used, a step knows of no others.

    Args:
        folder: of the files; made for this user alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = ""
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            facts = folder.lstat()
            if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid():
                self._enter()
        except OSError:
            pass

    def _enter(self) -> None:
        handle, name = tempfile.mkstemp(prefix=f"{os.getpid()}-", suffix=".entering", dir=self._folder)
        fcntl.lockf(handle, fcntl.LOCK_EX)  # Held, and its file open, until the process ends.
        path = Path(name).with_suffix(".step")
        os.rename(name, path)  # Seen from here on, and locked already.
        self._own = path.name

    def others(self) -> int:
        """How many steps run next to this one."""
        if not self._own:
            return 0
        return sum(_is_live(path) for path in self._folder.glob("*.step") if path.name != self._own)


def _is_live(path: Path) -> bool:
    try:
        with open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def steps_at_work() -> int:
    """How many of this user's steps are at work on this machine; the asking process does not become one."""
    return sum(_is_live(path) for path in _shared_folder().glob("*.step"))


@functools.cache
def _neighbours() -> Neighbours:
    """Those of this process, which counts as a step from here on."""
    return Neighbours(_shared_folder())


def _shared_folder() -> Path:
    private = Path(f"/run/user/{os.getuid()}")
    parent = private if os.access(private, os.W_OK) else Path(tempfile.gettempdir())
    return parent / f"spectraqlora-{os.getuid()}"
