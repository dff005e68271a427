"""All that talks to object storage: folders and files at s3:// addresses."""

from spectraqlora.storage.address import Address, parse_address
from spectraqlora.storage.connection import Connection, ObjectChanged, ObjectDamaged, ObjectMissing
from spectraqlora.storage.download import download_file, download_folder
from spectraqlora.storage.folders import (
    check_writable,
    content_digest,
    exists,
    folders_below,
    list_files,
    read_bytes,
    read_folder,
    read_manifest,
    remove_folder,
)
from spectraqlora.storage.local_copy import local_copy
from spectraqlora.storage.objects import ListedObject, list_objects, remove_objects
from spectraqlora.storage.ranged import RangedReader, open_files, ranged_reader
from spectraqlora.storage.upload import upload_file, upload_folder

__all__ = [
    "Address",
    "Connection",
    "ListedObject",
    "ObjectChanged",
    "ObjectDamaged",
    "ObjectMissing",
    "RangedReader",
    "check_writable",
    "content_digest",
    "download_file",
    "download_folder",
    "exists",
    "folders_below",
    "list_files",
    "list_objects",
    "local_copy",
    "open_files",
    "parse_address",
    "ranged_reader",
    "read_bytes",
    "read_folder",
    "read_manifest",
    "remove_folder",
    "remove_objects",
    "upload_file",
    "upload_folder",
]
