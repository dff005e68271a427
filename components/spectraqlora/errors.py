"""The errors a user is expected to read."""

import re

_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")


class InputError(Exception):
    """Bad input. The message is one line: the field, the value and what was expected.

    User and password of an address are left out.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        shown = _USER_INFO.sub("***@", str(value))
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(f"{field}: {shown!r}: expected {expected}".replace("\n", " "))


class Stopped(Exception):
    """A signal ended the work where it can be taken up again."""

    def __init__(self, signal_number: int, message: str) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)
