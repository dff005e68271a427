"""One of several machines that train together: `python -m spectraqlora.steps.train.node ADDRESS REQUEST`.

Kubeflow Trainer starts this in every pod of a training. ADDRESS is where the inputs are and the adapter goes
(`spectraqlora.steps.train.exchange`); REQUEST is a `TrainRequest` as JSON. The request is no object of the bucket: who
can write to that must not choose which servers get this pod's credentials.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from spectraqlora.runtime.step import step


@step
def train_here(address: str, request: str) -> None:
    """Fetch the inputs, train together with the other machines, and publish the adapter from the first one.

    Raises:
        InputError: unusable inputs, or variables or an address that say nothing.
    """
    from spectraqlora.steps.train.exchange import fetch_inputs, publish_adapter
    from spectraqlora.steps.train.launch import launch
    from spectraqlora.steps.train.nodes import Nodes
    from spectraqlora.steps.train.request import TrainRequest
    from spectraqlora.storage import parse_address

    nodes, place = Nodes.from_environment(), parse_address(address, "exchange address")
    given = TrainRequest.parse(request)
    # No machine sees another one's disk: checkpoints are at their address alone.
    given = replace(given, checkpoint=given.checkpoint.model_copy(update={"folder": ""}))
    with tempfile.TemporaryDirectory(prefix="spectraqlora-") as folder:
        here = fetch_inputs(given, place, Path(folder))
        launch(nodes.processes, here, nodes)
        if nodes.index == 0:
            publish_adapter(here, place)


def main() -> None:
    # A container's first process is not ended by a signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    train_here(*sys.argv[1:3])


if __name__ == "__main__":
    main()
