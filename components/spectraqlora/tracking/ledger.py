"""The ledger of champions: one champion, whoever promotes at the same time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from spectraqlora import __version__
from spectraqlora.errors import InputError
from spectraqlora.tracking.registry import CHAMPION, PREVIOUS, Registry, Version
from spectraqlora.tracking.runs import Tracker, write_once
from spectraqlora.tracking.server import explain_errors

Kind = Literal["promoted", "forced", "rolled back", "set by hand"]
_SLOT = "champion.{:06d}"
_FOLLOWED, _RECORDED = f"{_SLOT}.done", f"{_SLOT}.recorded"
_REASON_LENGTH = 250


@dataclass(frozen=True)
class LedgerEntry:
    """An entry of the ledger: which version became champion after which, and why."""

    number: int
    version: int
    before: int | None
    kind: Kind
    reason: str
    at: float
    """When, in seconds since 1970."""
    by: str = ""
    """SpectraQLoRA's version that wrote it; 0.1.0 did not say."""


class Ledger:
    """Who was champion of a registered model, in order.

    The alias `champion` is what users load. MLflow can set an alias but not compare and set it, so two
    promotions that read the same champion could both replace it. What decides is therefore a ledger: a run
    `champions of NAME` whose params `champion.000001`, `champion.000002`, … MLflow accepts only once each.
    Whoever writes the next entry first has promoted; who comes second reads the new champion and decides
    again.

    What follows from an entry has a param each, written when it is done: `.done` once the aliases follow it,
    `.recorded` once the decision is among the tags of its versions. The next promotion completes the aliases
    of one that was stopped in between; its own retry, which knows the numbers, completes the tags.

    Args:
        registry: of the model.

    Raises:
        InputError: the server does not answer or does not let us in.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._client, self._settings = registry.client, registry.settings
        # Elected like a pipeline's run, in an experiment of its own.
        own = self._settings.model_copy(update={"experiment": f"{self._settings.experiment} champions"})
        tracker = Tracker(own, f"champions of {registry.name}")
        self._run = tracker.pipeline_run()
        tracker.finish(self._run)

    def _params(self) -> dict[str, str]:
        with explain_errors(self._settings):
            return dict(self._client.get_run(self._run).data.params)

    def entries(self) -> list[LedgerEntry]:
        """All entries, oldest first."""
        return _entries(self._params())

    def unrecorded(self) -> list[LedgerEntry]:
        """Entries, oldest first, whose decision is not among the tags of their versions yet."""
        params = self._params()
        return [
            entry
            for entry in _entries(params)
            if entry.by and entry.kind != "set by hand" and _RECORDED.format(entry.number) not in params
        ]

    def mark_recorded(self, entry: LedgerEntry) -> None:
        """Say that an entry's decision is among the tags of its versions."""
        with explain_errors(self._settings):
            write_once(self._client, self._run, _RECORDED.format(entry.number), "tags set")

    def settle(self) -> Version | None:
        """The present champion, after what a stopped promotion left is completed.

        The aliases follow the last entry. A champion that somebody set in MLflow itself is taken as it is, and
        gets an entry.
        """
        return self._settled()[1]

    def _settled(self) -> tuple[list[LedgerEntry], Version | None]:
        """The entries, and then the champion: whoever is second to write the next entry decided on an older one."""
        while True:
            params = self._params()
            entries = _entries(params)
            if entries and _FOLLOWED.format(len(entries)) not in params:
                self._follow()
                continue
            champion = self.registry.by_alias(CHAMPION)
            known = entries[-1].version if entries else None
            if champion is None or champion.number == known:
                return entries, champion
            self._append(len(entries) + 1, champion.number, known, "set by hand", "alias set in MLflow")

    def _follow(self) -> None:
        """Point the aliases at the last entry's champion, and at the one before it."""
        name = self.registry.name
        while True:
            entries = self.entries()
            last = entries[-1]
            before = _predecessor(entries, last.version)
            with explain_errors(self._settings):
                self._client.set_registered_model_alias(name, CHAMPION, str(last.version))
                if before is not None:
                    self._client.set_registered_model_alias(name, PREVIOUS, str(before))
                else:
                    self._client.delete_registered_model_alias(name, PREVIOUS)
                write_once(self._client, self._run, _FOLLOWED.format(last.number), "aliases set")
            # A promotion that ended meanwhile set them to newer versions, which we may have undone.
            if len(self.entries()) == last.number:
                return

    def change_champion(
        self,
        decide: Callable[[Version | None], tuple[int, Kind, str] | None],
    ) -> tuple[LedgerEntry | None, Version | None]:
        """Replace the champion, unless another promotion comes in between: then decide again on what it left.

        Args:
            decide: gets the present champion; gives (version, kind, reason), or None to leave it.

        Returns:
            The new ledger entry, or None, and the champion that the decision was made against.
        """
        while True:
            entries, champion = self._settled()
            choice = decide(champion)
            if choice is None:
                return None, champion
            version, kind, reason = choice
            before = champion.number if champion else None
            entry = self._append(len(entries) + 1, version, before, kind, reason)
            if entry is not None:
                self._follow()
                return entry, champion

    def _append(
        self, number: int, version: int, before: int | None, kind: Kind, reason: str
    ) -> LedgerEntry | None:
        """Write entry `number`; None where another one has it already."""
        entry = LedgerEntry(number, version, before, kind, reason[:_REASON_LENGTH], time.time(), __version__)
        text = json.dumps({key: value for key, value in asdict(entry).items() if key != "number"})
        with explain_errors(self._settings):
            ours = write_once(self._client, self._run, _SLOT.format(number), text) == text
        return entry if ours else None

    def previous(self) -> int:
        """The version that was champion before the present one.

        Raises:
            InputError: there is none to go back to.
        """
        champion = self.registry.by_alias(CHAMPION)
        before = _predecessor(self.entries(), champion.number) if champion else None
        if before is None or before not in {version.number for version in self.registry.versions()}:
            raise InputError(
                "rollback",
                self.registry.name,
                "a champion that replaced an earlier one; there is none to go back to",
            )
        return before


def _entries(params: dict[str, str]) -> list[LedgerEntry]:
    entries: list[LedgerEntry] = []
    while (text := params.get(_SLOT.format(len(entries) + 1))) is not None:
        entries.append(LedgerEntry(len(entries) + 1, **json.loads(text)))
    return entries


def _predecessor(entries: list[LedgerEntry], version: int) -> int | None:
    """Whom a champion replaced when it was promoted: a rollback undoes a promotion, not a rollback."""
    for entry in reversed(entries):
        if entry.version == version and entry.kind != "rolled back":
            return entry.before
    return None
