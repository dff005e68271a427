"""What MLflow says is still needed: its runs by pipeline run, and the registered versions with their aliases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.registry import OWN_TAG
from spectraqlora.tracking.runs import RUN_KEY
from spectraqlora.tracking.server import connect, explain_errors

KEEP = "spectraqlora.keep"
"""Tag of a pipeline's run by which people keep all that it made, whatever its value."""
EXPORT, PUBLISHED = "export_uri", "published."
"""Tags of a version, and of its run: where the exported model's artifact is; and, by folder, where that was published."""
CHECKPOINTS = "spectraqlora.checkpoints."
"""Begin of the tags of a branch's run that name the trainings whose checkpoints it may take up."""
_ARCHIVED = "Archived"
_PAGE = 1000


@dataclass
class KnownRun:
    """A pipeline run as MLflow knows it, its branches included."""

    key: str
    statuses: set[str] = field(default_factory=set)
    keep: bool = False

    @property
    def under_way(self) -> bool:
        """Whether a run of it is still marked as running."""
        return bool({"RUNNING", "SCHEDULED"} & self.statuses)


@dataclass(frozen=True)
class NeededVersion:
    """A registered version that is not archived."""

    name: str
    number: int
    run_key: str
    aliases: tuple[str, ...]
    export: str
    published: frozenset[str]


@dataclass
class Needs:
    """All that MLflow says.

    Args:
        runs: by pipeline run, those that were deleted in MLflow included.
        versions: of every registered model.
        trainings: statuses of the branches by the identity of the training whose checkpoints they may take up.
        published: addresses at which some run has published its export.
    """

    runs: dict[str, KnownRun] = field(default_factory=dict)
    versions: list[NeededVersion] = field(default_factory=list)
    trainings: dict[str, set[str]] = field(default_factory=dict)
    published: set[str] = field(default_factory=set)

    @property
    def under_way(self) -> list[str]:
        """Pipeline runs that have not ended."""
        return sorted(run.key for run in self.runs.values() if run.under_way)


def read_needs(settings: TrackingSettings) -> Needs:
    """Ask MLflow for all runs of this project's pipelines and all registered versions.

    Raises:
        InputError: the server does not answer, or does not let us in.
    """
    client = connect(settings)
    needs = Needs()
    with explain_errors(settings):
        for run in _runs(client):
            _take_run(needs, run)
        for model in _pages(client.search_registered_models, max_results=100):
            numbers: dict[str, list[str]] = {}
            for alias, number in client.get_registered_model(model.name).aliases.items():
                numbers.setdefault(str(number), []).append(alias)
            for entry in _pages(client.search_model_versions, f"name='{model.name}'"):
                if entry.current_stage != _ARCHIVED:
                    needs.versions.append(_version(entry, numbers.get(str(entry.version), [])))
    return needs


def _runs(client: Any) -> list[Any]:
    from mlflow.entities import ViewType

    experiments = _pages(client.search_experiments, view_type=ViewType.ALL)
    identifiers = [experiment.experiment_id for experiment in experiments]
    query = f"tags.`{RUN_KEY}` LIKE '%'"
    return _pages(client.search_runs, identifiers, query, ViewType.ALL, max_results=_PAGE)


def _pages(ask: Any, *arguments: Any, **named: Any) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = ask(*arguments, **named, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _take_run(needs: Needs, run: Any) -> None:
    tags = run.data.tags
    known = needs.runs.setdefault(tags[RUN_KEY], KnownRun(tags[RUN_KEY]))
    deleted = run.info.lifecycle_stage == "deleted"
    if not deleted:
        known.statuses.add(run.info.status)
        known.keep |= KEEP in tags
    needs.published |= _published(tags)
    for name in tags:
        if name.startswith(CHECKPOINTS):
            status = "FINISHED" if deleted else run.info.status
            needs.trainings.setdefault(name.removeprefix(CHECKPOINTS), set()).add(status)


def _version(entry: Any, aliases: list[str]) -> NeededVersion:
    tags = entry.tags
    return NeededVersion(
        entry.name,
        int(entry.version),
        tags.get(OWN_TAG, ""),
        tuple(sorted(aliases)),
        tags.get(EXPORT, ""),
        _published(tags),
    )


def _published(tags: dict[str, str]) -> frozenset[str]:
    return frozenset(value for name, value in tags.items() if name.startswith(PUBLISHED))
