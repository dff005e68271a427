"""What can go, why, and what stays: made completely before anything is removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One thing that can go.

    Args:
        what: its kind, in words.
        place: its path or address.
        size: bytes that its removal frees.
        modified: when anything of it was written last, in seconds since 1970.
        reason: why nobody needs it.
        remove: removes it.
    """

    what: str
    place: str
    size: int
    modified: float
    reason: str
    remove: Callable[[], None]


@dataclass
class Kept:
    """What stays, for one reason: how many things, of how many bytes, the first of them."""

    first: str
    count: int = 0
    size: int = 0


@dataclass
class Plan:
    """Entries that can go, and what stays by reason."""

    entries: list[Entry] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)

    def keep(self, place: object, size: int, reason: str) -> None:
        """Count something that stays."""
        kept = self.kept.setdefault(reason, Kept(str(place)))
        kept.count += 1
        kept.size += size

    def add(self, other: Plan) -> None:
        """Add all of another plan."""
        self.entries += other.entries
        for reason, kept in other.kept.items():
            mine = self.kept.setdefault(reason, Kept(kept.first))
            mine.count += kept.count
            mine.size += kept.size

    def remove(self, entry: Entry) -> None:
        """Add something that can go."""
        self.entries.append(entry)


@dataclass(frozen=True)
class Guard:
    """Nothing that was written lately goes.

    Args:
        now: seconds since 1970.
        seconds: how old the newest part of a thing must be.
        said: the same as the user said it.
    """

    now: float
    seconds: int
    said: str

    def young(self, modified: float) -> bool:
        """Whether something was written too lately to go."""
        return self.now - modified < self.seconds

    @property
    def reason(self) -> str:
        """Why it stays."""
        return f"younger than {self.said}"
