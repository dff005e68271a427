"""The errors a user is expected to read, and text from outside as it may be shown."""

import os
import re
from urllib.parse import unquote

_USER_INFO = re.compile(r"(?<=://)(?:[^\s/:@]*:[^\s]*|[^\s/@]*)@")
"""User and password of an address; a password may have / and @ in it that should have been escaped."""
_SECRET = re.compile(
    r"(?<=[?&;#])((?:[\w.-]*(?:pass(?:word|wd|phrase)?|pwd|token|secret|signature|credential|"
    r"(?:api|access|account)[_-]?key(?:_?id)?)|auth|sig|key)=)[^\s&;#]*",
    re.IGNORECASE,
)
"""What a part of an address's query is called that lets somebody in, and its value."""
_PASSING = re.compile(
    r"NewConnectionError|ConnectionRefused|Connection refused|ConnectionReset|Connection reset|Connection aborted|"
    r"RemoteDisconnected|IncompleteRead|Timeout|timed out|NameResolutionError|Name or service not known|"
    r"Temporary failure in name resolution|too many (?:429|5\d\d) error responses|error code (?:429|5\d\d)"
)
_LASTING = re.compile(r"CERTIFICATE|BadStatusLine")
"""A certificate that is not trusted, or a server of another protocol."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys instead of showing them, or that turn the order of those around them."""


def holds_secret(address: str) -> bool:
    """Whether an address has a user, a password, or a query or fragment with something that lets somebody in."""
    scheme, _, rest = address.partition("://")
    if scheme == "s3":  # A key may have @ in it, a bucket not.
        bucket = rest.partition("/")[0]
        rest = bucket.replace(":", "@")
    # What begins with a slash is a path: sqlite:////home/me@work/mlflow.db.
    signed_in = "@" in rest and not rest.startswith("/")
    return signed_in or _SECRET.search(unquote(unquote(address))) is not None


def masked(text: str) -> str:
    """Text without users, passwords, tokens and signatures of the addresses in it."""
    return _SECRET.sub(r"\1***", _USER_INFO.sub("***@", text))


def printable(text: str) -> str:
    """Text from outside without characters that a terminal obeys: they are written out, as \\x1b; lines stay lines."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", lines
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


class InputError(Exception):
    """Bad input. The message is one line: the field, the value and what was expected.

    Users, passwords and tokens of addresses are left out, and control characters are written out.
    """

    exit_code = 2
    """Of a step or command that it ends: another attempt would refuse the same."""
    prefix = ""
    """How its line begins where it ends a step or command."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        shown = _short(masked(str(value)), 200)
        line = f"{_short(field, 400)}: {shown!r}: expected {_short(masked(expected), 1000)}".replace(
            "\n", " "
        )
        super().__init__(printable(line).replace("\n", " "))


class NoAnswer(InputError):
    """A service does not answer, or answers that it cannot now: another attempt may find it there."""

    exit_code = os.EX_TEMPFAIL
    prefix = "no answer: "


def busy(status: int | None) -> bool:
    """Whether a server says by its HTTP status that it cannot now."""
    return status == 429 or (status or 0) >= 500


def passing(error: BaseException) -> bool:
    """Whether clients say of a connection what another attempt may not meet: nobody listens, it broke off, or took too long.

    They wrap each other's errors, some as text alone, so it is the text that is read.
    """
    text = f"{type(error).__name__}: {error}"
    return _PASSING.search(text) is not None and _LASTING.search(text) is None


class Stopped(Exception):
    """A signal ended the work where it can be taken up again."""

    def __init__(self, signal_number: int, message: str) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)
