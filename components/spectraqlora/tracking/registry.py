"""The MLflow model registry: versions, their numbers, and one champion whoever promotes at the same time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectraqlora.artifacts import RankMap
from spectraqlora.errors import InputError
from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.runs import Tracker, write_once
from spectraqlora.tracking.server import connect, explain_errors

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
EVAL_ROWS, ADAPTER = "eval_rows", "adapter"
"""Folders among the artifacts of a version's run: the rows it was scored on, its adapter with rank map."""
DECISION = "promotion."
"""Tags of a version that begin so tell the gate's last decision on it."""
_SLOT = "champion.{:06d}"
_DONE = "champion.{:06d}.done"


@dataclass(frozen=True)
class Version:
    """A registered version: its number, run, tags and aliases."""

    name: str
    number: int
    run_id: str
    tags: dict[str, str]
    aliases: tuple[str, ...]
    created_ms: int

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers among the tags."""
        found = {}
        for key, value in self.tags.items():
            if not key.startswith(DECISION):
                with contextlib.suppress(ValueError):
                    found[key] = float(value)
        return found


@dataclass(frozen=True)
class LedgerEntry:
    """An entry of the ledger: which version became champion after which, and why."""

    number: int
    version: int
    before: int | None
    kind: Literal["promoted", "forced", "rolled back", "set by hand"]
    reason: str
    at: float


class Registry:
    """Versions of one registered model.

    The alias `champion` is what users load. MLflow can set an alias but not compare and set it, so two
    promotions that read the same champion could both replace it. What decides is therefore a ledger: a run
    `champions of NAME` whose params `champion.000001`, `champion.000002`, … MLflow accepts only once each.
    Whoever writes the next entry first has promoted; who comes second reads the new champion and decides
    again. The aliases follow the ledger; a promotion that died before it set them is completed by the next.

    Raises:
        InputError: the server does not answer or does not let us in, or there is no such model.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        self.settings, self.name = settings, settings.registered_model
        self.client = connect(settings)
        with explain_errors(settings):
            self.client.search_registered_models(max_results=1)

    def _asking(self) -> contextlib.AbstractContextManager[None]:
        return explain_errors(self.settings)

    def versions(self) -> list[Version]:
        """All versions, newest first; none where the model is not registered."""
        from mlflow.exceptions import MlflowException

        with self._asking():
            try:
                aliases = self.client.get_registered_model(self.name).aliases
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return []
            found: list[Any] = []
            token = None
            while True:
                page = self.client.search_model_versions(f"name='{self.name}'", page_token=token)
                found += page
                token = page.token
                if not token:
                    break
        names: dict[int, list[str]] = {}
        for alias, number in aliases.items():
            names.setdefault(int(number), []).append(alias)
        versions = [
            Version(
                self.name,
                int(v.version),
                v.run_id,
                dict(v.tags),
                tuple(sorted(names.get(int(v.version), []))),
                v.creation_timestamp,
            )
            for v in found
        ]
        return sorted(versions, key=lambda v: -v.number)

    def version(self, which: int | str) -> Version:
        """A version by number or alias."""
        found = self.versions()
        for candidate in found:
            if candidate.number == which or which in candidate.aliases:
                return candidate
        known = ", ".join(f"{v.number} {' '.join(v.aliases)}".strip() for v in found) or "it has none"
        raise InputError(self.name, which, f"a version or alias of this model: {known}")

    def by_alias(self, alias: str) -> Version | None:
        """The version with an alias; None where there is none."""
        return next((v for v in self.versions() if alias in v.aliases), None)

    def tag(self, version: int, tags: dict[str, str]) -> None:
        """Set tags of a version."""
        with self._asking():
            for key, value in tags.items():
                self.client.set_model_version_tag(self.name, str(version), key, value[:5000])

    def set_alias(self, alias: str, version: int) -> None:
        """Point an alias at a version."""
        with self._asking():
            self.client.set_registered_model_alias(self.name, alias, str(version))

    def run_metrics(self, version: Version) -> dict[str, float]:
        """Metrics of the version's run; its tags win over them."""
        with self._asking():
            return {**self.client.get_run(version.run_id).data.metrics, **version.metrics}

    def download(self, version: Version, folder: str, target: Path) -> Path:
        """Fetch a folder of the artifacts of the version's run."""
        from mlflow.exceptions import MlflowException

        with self._asking():
            try:
                return Path(self.client.download_artifacts(version.run_id, folder, str(target)))
            except (MlflowException, OSError) as error:
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise
                raise InputError(
                    f"{self.name} version {version.number}", folder, "these artifacts beside its run"
                ) from None

    def download_model(self, version: Version, target: Path) -> Path:
        """Fetch a version's model."""
        import mlflow

        with self._asking():
            mlflow.set_tracking_uri(self.settings.uri)
            mlflow.set_registry_uri(self.settings.uri)
            return Path(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"models:/{self.name}/{version.number}", dst_path=str(target)
                )
            )

    def champion_adapter(self, target: Path) -> tuple[Version, Path] | None:
        """The champion and its adapter, rank map beside it; None where there is no champion or no adapter."""
        champion = self.by_alias(CHAMPION)
        if champion is None:
            return None
        try:
            folder = self.download(champion, ADAPTER, target)
        except InputError:
            return None
        return (champion, folder) if (folder / RankMap.filename()).exists() else None

    def _ledger(self) -> str:
        """Run that holds the ledger; elected like a pipeline's run, in an experiment of its own."""
        own = self.settings.model_copy(update={"experiment": f"{self.settings.experiment} champions"})
        tracker = Tracker(own, f"champions of {self.name}")
        run = tracker.pipeline_run()
        tracker.finish(run)
        return run

    def history(self) -> list[LedgerEntry]:
        """The ledger, oldest first."""
        ledger = self._ledger()
        with self._asking():
            return self._read(ledger)[0]

    def _read(self, ledger: str) -> tuple[list[LedgerEntry], bool]:
        """The ledger's entries, and whether the aliases followed the last one."""
        params = self.client.get_run(ledger).data.params
        reigns: list[LedgerEntry] = []
        while (entry := params.get(_SLOT.format(len(reigns) + 1))) is not None:
            reigns.append(LedgerEntry(len(reigns) + 1, **json.loads(entry)))
        return reigns, not reigns or _DONE.format(len(reigns)) in params

    def _follow(self, ledger: str) -> LedgerEntry | None:
        """Point the aliases at the ledger's last champion, and at the one before it."""
        while True:
            reigns, _ = self._read(ledger)
            if not reigns:
                return None
            last = reigns[-1]
            self.client.set_registered_model_alias(self.name, CHAMPION, str(last.version))
            before = _predecessor(reigns, last.version)
            if before is not None:
                self.client.set_registered_model_alias(self.name, PREVIOUS, str(before))
            else:
                self.client.delete_registered_model_alias(self.name, PREVIOUS)
            write_once(self.client, ledger, _DONE.format(last.number), "aliases set")
            # A promotion that ended meanwhile set them to newer versions, which we may have undone.
            if len(self._read(ledger)[0]) == last.number:
                return last

    def change_champion(
        self,
        decide: Callable[[Version | None], tuple[int, str, str] | None],
    ) -> tuple[LedgerEntry | None, Version | None]:
        """Replace the champion, unless another promotion comes in between: then decide again on what it left.

        Args:
            decide: gets the present champion; gives (version, kind, reason), or None to leave it.

        Returns:
            The new ledger entry, or None, and the champion that the decision was made against.
        """
        ledger = self._ledger()
        while True:
            with self._asking():
                reigns, followed = self._read(ledger)
                if not followed:
                    self._follow(ledger)
            present = self.by_alias(CHAMPION)
            known = reigns[-1].version if reigns else None
            if present is not None and present.number != known and followed:
                # Somebody set the alias in MLflow itself; the ledger takes note.
                self._append(
                    ledger, len(reigns) + 1, present.number, known, "set by hand", "alias set in MLflow"
                )
                continue
            chosen = decide(present)
            if chosen is None:
                return None, present
            version, kind, reason = chosen
            before = present.number if present else None
            if self._append(ledger, len(reigns) + 1, version, before, kind, reason):
                with self._asking():
                    self._follow(ledger)
                return LedgerEntry(len(reigns) + 1, version, before, kind, reason, time.time()), present  # type: ignore[arg-type]

    def _append(
        self, ledger: str, number: int, version: int, before: int | None, kind: str, reason: str
    ) -> bool:
        entry = {
            "version": version,
            "before": before,
            "kind": kind,
            "reason": reason[:250],
            "at": time.time(),
        }
        text = json.dumps(entry)
        with self._asking():
            return write_once(self.client, ledger, _SLOT.format(number), text) == text

    def previous(self) -> int:
        """The version that was champion before the present one.

        Raises:
            InputError: there is none to go back to.
        """
        champion = self.by_alias(CHAMPION)
        before = _predecessor(self.history(), champion.number) if champion else None
        if before is None or before not in {v.number for v in self.versions()}:
            raise InputError(
                "rollback", self.name, "a champion that replaced an earlier one; there is none to go back to"
            )
        return before


def _predecessor(reigns: list[LedgerEntry], version: int) -> int | None:
    """Whom a champion replaced when it was promoted: a rollback undoes a promotion, not a rollback."""
    for reign in reversed(reigns):
        if reign.version == version and reign.kind != "rolled back":
            return reign.before
    return None
