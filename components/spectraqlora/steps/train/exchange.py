"""What the step and the machines that train for it hand each other through object storage: they share no volume.

    <address>/four_bit, rows, rank_map, start   the step's inputs, published before the machines start
    <address>/adapter                           what they made, published by the first machine; it stays

Each is a folder as `storage` publishes it: complete or not there, and checked by SHA-256 when it is fetched.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from spectraqlora.errors import InputError
from spectraqlora.files import BOOKKEEPING
from spectraqlora.runtime.console import warn
from spectraqlora.steps.train.request import Inputs, TrainRequest
from spectraqlora.storage import Address, Connection, download_folder, remove_folder, upload_folder

_ADAPTER = "adapter"


def publish_inputs(request: TrainRequest, address: Address) -> None:
    """Upload the folders that a request reads; what is there already is not sent again.

    Raises:
        InputError: a store that refuses.
    """
    connection = Connection()
    for name, folder in vars(request.inputs).items():
        if folder is not None:
            upload_folder(folder, address.child(name), connection)


def fetch_inputs(request: TrainRequest, address: Address, folder: Path) -> TrainRequest:
    """Download a request's inputs below a folder of this machine; the same request, of what is there.

    Raises:
        InputError: an input that is not there or damaged, or a store that refuses.
    """
    connection = Connection()
    fetched = {name: folder / name for name, given in vars(request.inputs).items() if given is not None}
    for name, target in fetched.items():
        download_folder(address.child(name), target, connection)
    return replace(request, inputs=Inputs(**fetched), output=folder / _ADAPTER)


def remove_inputs(request: TrainRequest, address: Address) -> None:
    """Remove what `publish_inputs` uploaded; a store that refuses keeps it, and a warning says so."""
    try:
        for name in vars(request.inputs):
            remove_folder(address.child(name))
    except InputError as fault:
        warn(f"the inputs of a training stay at {address}: {fault}")


def publish_adapter(request: TrainRequest, address: Address) -> None:
    """Upload what was trained."""
    upload_folder(request.output, address.child(_ADAPTER))


def fetch_adapter(address: Address, output: Path, scratch: Path) -> None:
    """Download what was trained into a step's output folder.

    Args:
        address: of the exchange.
        output: the artifact's folder.
        scratch: an empty folder; downloads keep records of their own next to the files.
    """
    download_folder(address.child(_ADAPTER), scratch)
    shutil.copytree(scratch, output, ignore=shutil.ignore_patterns(BOOKKEEPING), dirs_exist_ok=True)
