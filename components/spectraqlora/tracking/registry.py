"""The MLflow model registry: the versions of one registered model, their tags and aliases."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectraqlora.artifacts import RankMap
from spectraqlora.errors import InputError
from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.server import AWAY, ServerAway, connect, explain_errors, fetching

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
HELD_OUT, ADAPTER = "eval_rows", "adapter"
"""Folders among the artifacts of a version's run: the rows it was scored on, its adapter with rank map."""
DECISION = "promotion."
"""Prefix of a version's tags that hold the gate's last decision on it."""
OWN_TAG, COMPLETING_TAG = "run_key", "merged_eval_loss"
"""Tags of every version of the register step; it writes the second one last."""
TEST_LOSS = "merged_test_loss"
"""Tag of versions that have test rows: the loss of what is registered on the rows that chose nothing."""
TAG_LENGTH = 5000


@dataclass(frozen=True)
class Version:
    """A registered version: its number, run, tags and aliases."""

    name: str
    number: int
    run_id: str
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers among the tags."""
        numbers = {}
        for key, value in self.tags.items():
            if not key.startswith(DECISION):
                with contextlib.suppress(ValueError):
                    numbers[key] = float(value)
        return numbers

    @property
    def complete(self) -> bool:
        """Whether all that registering writes is there; what others registered is taken as it is."""
        return OWN_TAG not in self.tags or COMPLETING_TAG in self.tags


class Registry:
    """Versions of one registered model.

    A version that the register step was stopped on is complete only once that step's retry has finished it;
    until then it is no candidate for anything.

    Args:
        settings: the `tracking` section.

    Raises:
        InputError: the server does not answer or does not let us in.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        self.settings, self.name = settings, settings.registered_model
        self.client = connect(settings)
        from mlflow.exceptions import MlflowException

        with explain_errors(settings):
            try:
                self.client.search_registered_models(max_results=1)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST" and error.get_http_status_code() != 404:
                    raise
                first = str(error).splitlines()[0]
                raise InputError("tracking.uri", settings.uri, f"an MLflow server ({first})") from None

    def versions(self) -> list[Version]:
        """The complete versions, newest first; none where the model is not registered."""
        return [version for version in self._all() if version.complete]

    def _all(self) -> list[Version]:
        from mlflow.exceptions import MlflowException

        with explain_errors(self.settings):
            try:
                aliases = self.client.get_registered_model(self.name).aliases
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return []
            entries = self._pages()
        names: dict[int, list[str]] = {}
        for alias, number in aliases.items():
            names.setdefault(int(number), []).append(alias)
        versions = [
            Version(
                self.name,
                int(entry.version),
                entry.run_id,
                dict(entry.tags),
                tuple(sorted(names.get(int(entry.version), []))),
            )
            for entry in entries
        ]
        return sorted(versions, key=lambda version: -version.number)

    def _pages(self) -> list[Any]:
        """MLflow's entities of all versions; it gives them out in pages."""
        entries: list[Any] = []
        token = None
        while True:
            page = self.client.search_model_versions(f"name='{self.name}'", page_token=token)
            entries += page
            token = page.token
            if not token:
                return entries

    def version(self, which: int | str) -> Version:
        """A complete version by number or alias.

        Raises:
            InputError: there is none, or its register step has not finished it.
        """
        versions = self._all()
        for version in versions:
            if version.number == which or which in version.aliases:
                if not version.complete:
                    raise InputError(
                        self.name,
                        which,
                        f"a complete version; the register step of run {version.tags[OWN_TAG]} was stopped "
                        "on this one, and a retry of that step completes it",
                    )
                return version
        known = ", ".join(f"{v.number} {' '.join(v.aliases)}".strip() for v in versions if v.complete)
        raise InputError(self.name, which, f"a version or alias of this model: {known or 'it has none'}")

    def by_alias(self, alias: str) -> Version | None:
        """The version that an alias points at; None where there is none."""
        return next((v for v in self._all() if alias in v.aliases), None)

    def of_run(self, run_id: str, tags: dict[str, str]) -> Version | None:
        """The version, complete or not, that a run registered with these tags."""
        return next(
            (v for v in self._all() if v.run_id == run_id and tags.items() <= v.tags.items()),
            None,
        )

    def tag(self, version: int, tags: dict[str, str]) -> None:
        """Set tags of a version, one request each, in their order."""
        with explain_errors(self.settings):
            for key, value in tags.items():
                self.client.set_model_version_tag(self.name, str(version), key, value[:TAG_LENGTH])

    def set_alias(self, alias: str, version: int) -> None:
        """Point an alias at a version."""
        with explain_errors(self.settings):
            self.client.set_registered_model_alias(self.name, alias, str(version))

    def run_metrics(self, version: Version) -> dict[str, float]:
        """Metrics of the version's run; its tags win over them."""
        with explain_errors(self.settings):
            return {**self.client.get_run(version.run_id).data.metrics, **version.metrics}

    def download(self, version: Version, folder: str, target: Path) -> Path:
        """Fetch a folder of the artifacts of the version's run.

        Raises:
            InputError: the run has no such folder.
            ServerAway: MLflow, or the store behind it, does not answer.
        """
        from mlflow.exceptions import MlflowException

        location = self._location(version, folder)
        with fetching(self.settings, location):
            try:
                return Path(self.client.download_artifacts(version.run_id, folder, str(target)))
            except (MlflowException, OSError) as error:
                away = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
                # Of a folder that is there MLflow's client says no more than that it failed.
                if away or (location and getattr(error, "error_code", "") in AWAY):
                    raise
                raise InputError(
                    f"{self.name} version {version.number}", folder, "these artifacts of its run"
                ) from None

    def _location(self, version: Version, folder: str) -> str:
        """MLflow's address of a file in a folder of the artifacts of the version's run; empty where there is none."""
        with explain_errors(self.settings):
            root = self.client.get_run(version.run_id).info.artifact_uri
            files = (entry.path for entry in self.client.list_artifacts(version.run_id, folder))
            return next((f"{root}/{path}" for path in files), "")

    def champion_adapter(self, target: Path) -> tuple[Version, Path] | None:
        """The champion and its adapter with the rank map; None where there is no champion or no adapter."""
        champion = self.by_alias(CHAMPION)
        if champion is None:
            return None
        try:
            folder = self.download(champion, ADAPTER, target)
        except ServerAway:
            raise
        except InputError:
            return None
        return (champion, folder) if (folder / RankMap.filename()).exists() else None
