"""Objects below an address, whoever wrote them: their listing, and their removal."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

from spectraqlora.storage.address import Address
from spectraqlora.storage.connection import Connection
from spectraqlora.storage.folders import MANIFEST, objects_below
from spectraqlora.storage.parallel import run_all


@dataclass(frozen=True)
class ListedObject:
    """An object as a listing shows it.

    Args:
        address: of the object.
        size: in bytes.
        modified: when it was written, in seconds since 1970.
    """

    address: Address
    size: int
    modified: float


def list_objects(address: Address, connection: Connection | None = None) -> list[ListedObject]:
    """Every object below an address.

    Raises:
        InputError: a store that refuses.
    """
    return [
        ListedObject(address.child(name), int(entry["Size"]), entry["LastModified"].timestamp())
        for name, entry in objects_below(connection or Connection(), address)
    ]


def remove_objects(addresses: Collection[Address], connection: Connection | None = None) -> None:
    """Remove objects; manifests go first, so that nobody reads what is going.

    Raises:
        InputError: a store that refuses; what was removed until then is gone.
    """
    connection = connection or Connection()

    def remove(address: Address) -> None:
        connection.call("delete_object", address, Key=address.key)

    manifests = {address for address in addresses if address.key.rpartition("/")[2] == MANIFEST}
    for chosen in (manifests, set(addresses) - manifests):
        run_all([functools.partial(remove, address) for address in chosen], connection.workers)
