"""What is fine, damaged at random: one value of a document, some bytes of a file; and how a command takes it."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator
from typing import Any

from spectraqlora.errors import InputError

LIMIT_S = 60
JUNK: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, -(10**30), 1.5, 1e308, float("nan"), "", "x", "../../etc/passwd",
    "\x1b[31m\n", "é" * 300, [], [None], [[[]]], {}, {"a": {"b": 1}}, [1] * 50, "float16", "llama", "bert", "mamba",
]  # fmt: skip


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Inside, work that takes longer fails."""

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged_json(document: Any, chance: random.Random) -> Any:
    """A document with one value, somewhere in it, gone, doubled or replaced."""
    if isinstance(document, dict) and document:
        key = chance.choice(sorted(document))
        if isinstance(document[key], (dict, list)) and document[key] and chance.random() < 0.6:
            return {**document, key: damaged_json(document[key], chance)}
        if chance.random() < 0.2:
            return {name: value for name, value in document.items() if name != key}
        return {**document, key: chance.choice(JUNK)}
    if isinstance(document, list) and document:
        place = chance.randrange(len(document))
        return [*document[:place], damaged_json(document[place], chance), *document[place + 1 :]]
    return chance.choice(JUNK)


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """Content that is cut, or has some bytes changed."""
    if chance.random() < 0.3:
        return content[: chance.randrange(len(content) + 1)]
    changed = bytearray(content)
    for _ in range(chance.choice([1, 3, 30])):
        changed[chance.randrange(min(len(changed), 4000))] = chance.randrange(256)
    return bytes(changed)


def outcome(action: Any, what: str) -> str:
    """`taken`, or `refused` where one line says why; all else is a failure of the test."""
    try:
        with limited(LIMIT_S):
            action()
    except InputError as refusal:
        message = str(refusal)
        assert "\n" not in message and len(message) < 1200 and ": expected " in message, (what, message)
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return "taken"
