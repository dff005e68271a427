"""Starting several training processes on one machine, joining them, and ending them together.

The processes find each other through a file in a folder that only this user can open, and talk over the loopback
interface alone. torch's own launcher would open a TCP store that listens on every interface and unpickles what it is
sent; here nothing listens to the network, and nothing that is received is unpickled.

Where several machines train together they meet as `spectraqlora.steps.train.nodes` says, and talk over the one network
by which they reach the first of them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from spectraqlora.models.hardware import device
from spectraqlora.runtime.console import fail
from spectraqlora.runtime.deferred_signals import deferred_signals
from spectraqlora.runtime.step import LAUNCHER_PID
from spectraqlora.runtime.threads import OWN, threads_per_process
from spectraqlora.steps.train.nodes import SCHEME, meet

if TYPE_CHECKING:
    from spectraqlora.steps.train.nodes import Nodes
    from spectraqlora.steps.train.request import TrainRequest

STORE = "SPECTRAQLORA_PROCESS_STORE"
"""Environment variable that names through what the processes of one training find each other: a file, or tcp://…"""
GRACE_SECONDS = 10.0
"""How long the others have to end by themselves once one process has failed."""


def launched() -> bool:
    """Whether this process is one of several that `launch`, or torchrun, started."""
    return STORE in os.environ or dist.is_torchelastic_launched()


def launch(count: int, request: TrainRequest, nodes: Nodes | None = None) -> None:
    """Train a request in `count` processes of `spectraqlora.steps.train.worker`.

    A SIGTERM or SIGINT is passed on to all of them, and their checkpoint is waited for. Where one fails, the others
    are ended and this process exits with its code; what went wrong is on the screen by then.

    Args:
        count: processes of this machine.
        request: what to train.
        nodes: the machines that train together; None is this one alone.
    """
    first = nodes.index * count if nodes else 0
    with tempfile.TemporaryDirectory(prefix="spectraqlora-") as folder:  # Created with mode 0700.
        path = Path(folder) / "request.json"
        request.write(path)
        meeting = _meeting_here(Path(folder) / "store", count) if nodes is None else _meeting(nodes)
        with deferred_signals() as stopped:
            workers = [
                subprocess.Popen(
                    [sys.executable, "-m", "spectraqlora.steps.train.worker", str(path)],
                    env={**os.environ, **_environment(index, count), **meeting, "RANK": str(first + index)},
                )
                for index in range(count)
            ]
            code = _wait(workers, stopped)
    if code:
        sys.exit(code)


def join() -> None:
    """Join the other processes: NCCL between GPUs, gloo between CPUs."""
    from accelerate import PartialState

    backend = "gloo"
    if device() == "cuda":
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if STORE in os.environ:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _store(os.environ[STORE], rank, count)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    PartialState(cpu=device() == "cpu")


def _store(place: str, rank: int, count: int) -> Any:
    if place.startswith(SCHEME):
        return meet(place, rank, count)
    return dist.FileStore(place, count)  # type: ignore[attr-defined, unused-ignore]


def _meeting_here(store: Path, count: int) -> dict[str, str]:
    """How the processes of one machine find each other and talk."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {STORE: str(store), "WORLD_SIZE": str(count), **_over(loopback)}


def _meeting(nodes: Nodes) -> dict[str, str]:
    """How the processes of several machines find each other and talk; a network that the user names wins."""
    return {
        STORE: nodes.store,
        "WORLD_SIZE": str(nodes.count * nodes.processes),
        # accelerate asks for these, and uses them where nobody has joined the processes before.
        "MASTER_ADDR": nodes.address,
        "MASTER_PORT": str(nodes.port),
        **{name: os.environ.get(name, found) for name, found in _over(nodes.interface()).items()},
    }


def _over(interface: str) -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def _environment(index: int, count: int) -> dict[str, str]:
    """What this machine's process of this number needs to know, in the variables that torch and accelerate read."""
    variables = {
        LAUNCHER_PID: str(os.getpid()),
        OWN: str(threads_per_process(count)),
        "LOCAL_WORLD_SIZE": str(count),
        # Every process sees its own GPU alone, as number 0.
        "LOCAL_RANK": "0",
    }
    if gpus := torch.cuda.device_count():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = given.split(",") if given else [str(number) for number in range(gpus)]
        variables["CUDA_VISIBLE_DEVICES"] = names[index].strip()
    return variables


def _wait(workers: list[subprocess.Popen[bytes]], stopped: Callable[[], int]) -> int:
    """Wait for all; the exit code of the first that failed, 0 where none did.

    A signal is passed on, and then every process ends by itself, after its checkpoint.
    """
    passed_on = False
    try:
        while any(worker.poll() is None for worker in workers):
            if not passed_on and (number := stopped()):
                passed_on = True
                for worker in workers:
                    worker.send_signal(number)
            if not passed_on and (code := _first_failure(workers)):
                return code
            time.sleep(0.1)
        return _first_failure(workers)
    finally:
        _end(workers)


def _first_failure(workers: list[subprocess.Popen[bytes]]) -> int:
    for index, worker in enumerate(workers):
        code = worker.poll()
        if code and code < 0:
            reason = signal.Signals(-code).name
            hint = ", as one is that takes more memory than there is" if -code == signal.SIGKILL else ""
            fail(f"training process {index} of {len(workers)} was ended by {reason}{hint}")
            return 128 - code
        if code:
            return code
    return 0


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """End those that still run: asked first, killed after `GRACE_SECONDS`."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    until = time.monotonic() + GRACE_SECONDS
    for worker in running:
        try:
            worker.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
