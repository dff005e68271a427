"""The only module that talks to object storage: folders, files and checkpoints at s3:// addresses."""

from spectraqlora.storage.address import Address, is_address, parse_address
from spectraqlora.storage.connection import Connection, ObjectChanged, ObjectMissing
from spectraqlora.storage.download import download_file, download_folder
from spectraqlora.storage.folders import exists, list_files
from spectraqlora.storage.ranged import RangedReader, S3Checkpoint, ranged_reader
from spectraqlora.storage.upload import upload_file, upload_folder

__all__ = [
    "Address",
    "Connection",
    "ObjectChanged",
    "ObjectMissing",
    "RangedReader",
    "S3Checkpoint",
    "download_file",
    "download_folder",
    "exists",
    "is_address",
    "list_files",
    "parse_address",
    "ranged_reader",
    "upload_file",
    "upload_folder",
]
