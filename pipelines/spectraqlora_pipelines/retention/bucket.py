"""What can go below an address: step artifacts of Kubeflow Pipelines, checkpoints, published exports.

They are known by their keys, whatever is before them:

    spectraqlora-ablation/<run>/<step>/<execution>/<artifact>/…    artifacts, as KFP's driver lays them out
    <training>/step-000000120-5f3a09c1/…                           checkpoints
    merged/_manifest.json, merged/_files-<version>/…               published exports

Kubeflow Pipelines may hand an artifact of one run to any later run, and forgets none: needed is therefore what a
needed run's artifacts were made from, too, which each says in its `made_from.json`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from spectraqlora.errors import InputError
from spectraqlora.runtime.step import MADE_FROM
from spectraqlora.storage import (
    Address,
    Connection,
    ListedObject,
    ObjectMissing,
    read_bytes,
    read_manifest,
    remove_objects,
)
from spectraqlora.tracking.needs import NeededVersion, Needs

from spectraqlora_pipelines.retention.plan import Entry, Guard, Plan

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_EXECUTION = re.compile(rf"((?:.*/)?(spectraqlora-[^/]+)/({_UUID})/([^/]+)/{_UUID})/([^/]+)(?:/(.+))?")
_CHECKPOINT = re.compile(r"((?:.*/)?([0-9a-f]{32}))/step-\d{9}-[0-9a-f]{8}/.+")
_PUBLISHED = re.compile(r"((?:.*/)?(?:merged|adapter))/(?:_manifest\.json|(_files-[0-9a-f]{16})/.+)")
_LOGS = re.compile(r"executor-logs(-\d+)?")
EXPORTING = "merge-export"
UNKNOWN = "MLflow does not know the run or training that it is of (--unknown lists it, too)"
FOREIGN = "no artifact, checkpoint or export of this project"
UNDER_WAY = "may be taken up by a run that is under way: "
NO_ORIGIN = "older than needed artifacts that do not say what they were made from (of an earlier version)"


@dataclass
class _Group:
    """Objects that stay or go together."""

    place: Address
    name: str
    objects: list[ListedObject] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(each.size for each in self.objects)

    @property
    def newest(self) -> float:
        return max(each.modified for each in self.objects)


@dataclass
class _Execution(_Group):
    """One execution of a step: its artifacts and its log."""

    pipeline: str = ""
    run: str = ""
    step: str = ""
    artifacts: set[str] = field(default_factory=set)
    origins: list[Address] = field(default_factory=list)


class Bucket:
    """What is below an address, sorted by what it is.

    Args:
        objects: of the listing.
        connection: to the store.
    """

    def __init__(self, objects: Iterable[ListedObject], connection: Connection) -> None:
        self._connection = connection
        self.executions: dict[str, _Execution] = {}
        self.trainings: dict[str, _Group] = {}
        self.published: dict[str, dict[str, _Group]] = defaultdict(dict)
        self.foreign: list[ListedObject] = []
        for each in objects:
            self._sort(each)

    def _sort(self, each: ListedObject) -> None:
        key, bucket = each.address.key, each.address.bucket
        if match := _EXECUTION.fullmatch(key):
            folder, pipeline, run, step, artifact, name = match.groups()
            group = self.executions.setdefault(
                f"{bucket}/{folder}",
                _Execution(Address(bucket, folder), step, pipeline=pipeline, run=run, step=step),
            )
            if not _LOGS.fullmatch(artifact):
                group.artifacts.add(artifact)
            if name == MADE_FROM:
                group.origins.append(each.address)
            group.objects.append(each)
        elif match := _CHECKPOINT.fullmatch(key):
            folder, training = match.groups()
            place = Address(bucket, folder)
            self.trainings.setdefault(str(place), _Group(place, training)).objects.append(each)
        elif match := _PUBLISHED.fullmatch(key):
            folder, version = match.groups()
            place = Address(bucket, folder)
            versions = self.published[str(place)]
            versions.setdefault(version or "", _Group(place, version or "")).objects.append(each)
        else:
            self.foreign.append(each)

    def plan(self, needs: Needs, guard: Guard, unknown: bool) -> Plan:
        """What can go, and why the rest stays.

        Args:
            needs: what MLflow says.
            guard: what is too young to go.
            unknown: whether what MLflow does not know may go when it is old.

        Raises:
            InputError: a store that refuses, or a manifest that is damaged.
        """
        plan = Plan()
        for each in self.foreign:
            plan.keep(each.address, each.size, FOREIGN)
        self._plan_executions(plan, needs, guard, unknown)
        self._plan_checkpoints(plan, needs, guard, unknown)
        self._plan_published(plan, needs, guard, unknown)
        return plan

    def _plan_executions(self, plan: Plan, needs: Needs, guard: Guard, unknown: bool) -> None:
        kept = self._needed(needs, guard, unknown)
        gone: dict[str, list[_Execution]] = defaultdict(list)
        for key, each in self.executions.items():
            if key in kept:
                plan.keep(each.place, each.size, kept[key])
            else:
                gone[each.run].append(each)
        for run, executions in gone.items():
            objects = [each for execution in executions for each in execution.objects]
            folder = executions[0].place.key.split(f"/{run}/")[0] + f"/{run}"
            plan.remove(
                Entry(
                    "artifacts of a run's steps",
                    str(Address(executions[0].place.bucket, folder)),
                    sum(each.size for each in objects),
                    max(each.modified for each in objects),
                    _run_reason(needs, run),
                    partial(remove_objects, [each.address for each in objects], self._connection),
                )
            )

    def _needed(self, needs: Needs, guard: Guard, unknown: bool) -> dict[str, str]:
        """The executions that stay, each with its reason."""
        reasons: dict[str, str] = {}
        aliased = {version.run_key: version for version in needs.versions if version.aliases}
        newest: dict[str, float] = defaultdict(float)
        for each in self.executions.values():
            newest[each.run] = max(newest[each.run], each.newest)
        for key, each in self.executions.items():
            known = needs.runs.get(each.run)
            if guard.young(newest[each.run]):
                reasons[key] = f"of a run that is {guard.reason}"
            elif known is not None and known.keep:
                reasons[key] = "of a run that has the tag spectraqlora.keep"
            elif each.run in aliased:
                reasons[key] = f"of the run of {_described(aliased[each.run])}"
        roots = list(reasons)
        self._follow(roots, reasons)
        for version in needs.versions:
            for key, reason in self._exports(version).items():
                reasons.setdefault(key, reason)
        for key, each in self.executions.items():
            if needs.under_way:
                reasons.setdefault(key, f"{UNDER_WAY}{', '.join(needs.under_way[:3])}")
            elif each.run not in needs.runs and not unknown:
                reasons.setdefault(key, UNKNOWN)
        return reasons

    def _follow(self, roots: list[str], reasons: dict[str, str]) -> None:
        """Add what the executions were made from, and what that was made from."""
        silent: dict[str, float] = defaultdict(float)
        waiting = list(roots)
        while waiting:
            each = self.executions[waiting.pop()]
            if each.artifacts and not each.origins:
                silent[each.pipeline] = max(silent[each.pipeline], each.newest)
            for origin in self._origins(each):
                if origin in self.executions and origin not in reasons:
                    reasons[origin] = "needed artifacts were made from it"
                    waiting.append(origin)
        for key, each in self.executions.items():
            if each.newest <= silent[each.pipeline]:
                reasons.setdefault(key, NO_ORIGIN)

    def _origins(self, execution: _Execution) -> set[str]:
        """Keys of the executions that one says that it was made from."""
        found = set()
        for address in execution.origins:
            try:
                addresses = json.loads(read_bytes(self._connection, address))["made_from"]
                found |= {_execution_of(str(each)) for each in addresses}
            except ObjectMissing:
                continue  # It went since the listing.
            except (ValueError, KeyError, TypeError):
                raise InputError(MADE_FROM, address, "a JSON document with made_from") from None
        return found

    def _exports(self, version: NeededVersion) -> dict[str, str]:
        """Executions that hold a version's export; all that export where the version does not say which."""
        named = _described(version)
        if version.export:
            key = _execution_of(version.export)
            return {key: f"the export of {named}"} if key in self.executions else {}
        if not re.fullmatch(_UUID, version.run_key):
            return {}  # Of no run on Kubeflow, or somebody else's.
        exporting = {key: each for key, each in self.executions.items() if each.step == EXPORTING}
        own = [key for key, each in exporting.items() if each.run == version.run_key]
        if own:
            return dict.fromkeys(own, f"the export of {named}")
        return dict.fromkeys(exporting, f"may be the export of {named}, which does not say where that is")

    def _plan_checkpoints(self, plan: Plan, needs: Needs, guard: Guard, unknown: bool) -> None:
        for each in self.trainings.values():
            statuses = needs.trainings.get(each.name, set())
            finished = "FINISHED" in statuses
            if guard.young(each.newest):
                plan.keep(each.place, each.size, guard.reason)
            elif "RUNNING" in statuses:
                plan.keep(each.place, each.size, "checkpoints of a training that is under way")
            elif needs.under_way and not finished:
                plan.keep(each.place, each.size, f"{UNDER_WAY}{', '.join(needs.under_way[:3])}")
            elif not statuses and not unknown:
                plan.keep(each.place, each.size, UNKNOWN)
            else:
                reason = "its training is finished" if finished else "nobody took up this training since"
                plan.remove(self._entry("checkpoints", each, reason))

    def _plan_published(self, plan: Plan, needs: Needs, guard: Guard, unknown: bool) -> None:
        named = {address: version for version in needs.versions for address in version.published}
        for text, versions in self.published.items():
            place = next(iter(versions.values())).place
            manifest = read_manifest(self._connection, place)
            current = f"_files-{manifest.version}" if manifest is not None else ""
            for name, each in versions.items():
                address = f"{text}/{name}"
                if not name:
                    continue  # The manifest goes or stays with the current version.
                if address in named:
                    plan.keep(address, each.size, f"the published export of {_described(named[address])}")
                elif guard.young(each.newest):
                    plan.keep(address, each.size, guard.reason)
                elif name != current:
                    reason = "another one was published since" if current else "its upload never ended"
                    plan.remove(self._entry("a published export", each, reason))
                elif address in needs.published or unknown:
                    each.objects += versions[""].objects if "" in versions else []
                    plan.remove(self._entry("a published export", each, "no registered version names it"))
                else:
                    plan.keep(address, each.size, UNKNOWN)

    def _entry(self, what: str, group: _Group, reason: str) -> Entry:
        place = str(group.place) + (f"/{group.name}" if group.name.startswith("_files-") else "")
        remove = partial(remove_objects, [each.address for each in group.objects], self._connection)
        return Entry(what, place, group.size, group.newest, reason, remove)


def _execution_of(address: str) -> str:
    """Key of the execution that an artifact's address is of; empty where it is none's. Schemes differ (minio, s3)."""
    match = _EXECUTION.fullmatch(address.partition("://")[2])
    return match[1] if match else ""


def _run_reason(needs: Needs, run: str) -> str:
    known = needs.runs.get(run)
    if known is None:
        return "no version or later run needs them; MLflow does not know the run"
    ended = ", ".join(sorted(known.statuses)).lower() or "deleted in MLflow"
    return f"no version, alias or later run needs them; the run is {ended}"


def _described(version: NeededVersion) -> str:
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    return f"{version.name} version {version.number}{aliases}"
