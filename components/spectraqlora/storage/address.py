"""Addresses of objects and folders: `s3://bucket/prefix`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spectraqlora.errors import InputError, holds_secret, masked

SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class Address:
    """A bucket and a key without leading or trailing slash; an empty key is the whole bucket."""

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def child(self, name: str) -> Address:
        """The address of a name below this one."""
        return Address(self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def below(self) -> str:
        """What the keys of everything below this address begin with."""
        return f"{self.key}/" if self.key else ""


def parse_address(text: str, field: str = "s3 address") -> Address:
    """Read `s3://bucket/prefix`; slashes at the end mean nothing.

    Raises:
        InputError: another scheme, no valid bucket name, or a key with empty, `.` or `..` segments.
            Credentials and signatures that somebody pasted into the address are not repeated.
    """
    shown = masked(text).split("?")[0]
    if not text.startswith(SCHEME):
        raise InputError(field, shown, "s3://bucket/prefix")
    bucket, _, key = text.removeprefix(SCHEME).partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            field, shown, "s3://bucket/prefix with a bucket of 3 to 63 lower-case letters, digits, . and -"
        )
    if holds_secret(text):
        raise InputError(field, shown, "an address without keys, token or signature in it")
    key = key.rstrip("/")
    parts = key.split("/")
    if key and (any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\x00-\x1f\x7f]", key)):
        raise InputError(
            field, shown, "a prefix without empty, . or .. segments, backslashes or control characters"
        )
    return Address(bucket, key)
