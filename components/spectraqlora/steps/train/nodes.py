"""The machines of one training: which of them this is, and how its processes meet those of the others.

What torchrun's variables say is taken (`PET_*`, as Kubeflow Trainer sets them in every pod), and torchrun itself is not
used: its launcher unpickles what comes over its store. Here a process of the first machine opens torch's TCP store,
which keeps bytes and unpickles nothing, on the one address by which the others know that machine.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
from torch import distributed as dist

from spectraqlora.errors import InputError

SCHEME = "tcp://"
MEETING_TIME = timedelta(minutes=30)
"""How long the first processes wait for the last: machines get their pods, and fetch the base, at different times."""
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Nodes:
    """The machines of one training, as one of them sees them.

    Args:
        count: machines.
        index: this one's number among them, from 0.
        processes: training processes of each.
        address: by which the others know the first one: a name or an IP address.
        port: of the first one's store.
    """

    count: int
    index: int
    processes: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> Nodes:
        """The machines as torchrun's variables name them.

        Raises:
            InputError: a variable that is missing or no number.
        """
        nodes = cls(
            _number("PET_NNODES", 1),
            _number("PET_NODE_RANK", 0),
            _number("PET_NPROC_PER_NODE", 1),
            os.environ.get("PET_MASTER_ADDR", ""),
            _number("PET_MASTER_PORT", 1),
        )
        if not nodes.address:
            raise InputError("PET_MASTER_ADDR", "", "the first machine's name or address")
        if nodes.index >= nodes.count:
            raise InputError(
                "PET_NODE_RANK", nodes.index, f"a number below PET_NNODES, which is {nodes.count}"
            )
        return nodes

    @property
    def store(self) -> str:
        """Where all processes meet: tcp://ADDRESS:PORT."""
        return f"{SCHEME}{self.address}:{self.port}"

    def interface(self) -> str:
        """Name of the network interface over which this machine reaches the first one.

        Raises:
            InputError: the first machine has no address within `MEETING_TIME`.
        """
        own = self._own_address()
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address.partition("%")[0] == own for entry in addresses):
                return name
        raise InputError(
            "PET_MASTER_ADDR", self.address, f"an address of this machine's networks; {own} is of none"
        )

    def _own_address(self) -> str:
        """The address of this machine that the first one sees."""
        until = time.monotonic() + MEETING_TIME.total_seconds()
        while True:
            try:
                # Nothing is sent: connecting a datagram socket only asks for the route.
                (family, kind, *_, place), *_ = socket.getaddrinfo(
                    self.address, self.port, type=socket.SOCK_DGRAM
                )
                with socket.socket(family, kind) as probe:
                    probe.connect(place)
                    return str(probe.getsockname()[0])
            except OSError:  # Its pod is not there yet, or its name not yet known.
                if time.monotonic() > until:
                    raise InputError(
                        "PET_MASTER_ADDR", self.address, f"an address that is known within {MEETING_TIME}"
                    ) from None
                time.sleep(_RETRY_SECONDS)


def meet(store: str, rank: int, count: int) -> Any:
    """The store at tcp://ADDRESS:PORT, opened by the first process on this address alone."""
    host, _, port = store.removeprefix(SCHEME).rpartition(":")
    open_store = functools.partial(dist.TCPStore, host, int(port), count)  # type: ignore[attr-defined, unused-ignore]
    if rank:
        return open_store(False, MEETING_TIME, wait_for_workers=False)
    family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
    # Left to itself, the store would listen on every interface.
    listening = socket.create_server((host, int(port)), family=family, backlog=count)
    return open_store(True, MEETING_TIME, wait_for_workers=False, master_listen_fd=listening.detach())


def _number(variable: str, least: int) -> int:
    text = os.environ.get(variable, "")
    if not text.isdecimal() or int(text) < least:
        raise InputError(variable, text, f"a number from {least}, as Kubeflow Trainer sets it in a pod")
    return int(text)
