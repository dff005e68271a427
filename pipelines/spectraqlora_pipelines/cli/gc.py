"""The command gc."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from spectraqlora.errors import InputError
from spectraqlora.runtime.cache import cache_folder, plainly_named
from spectraqlora.settings import TrackingSettings

from spectraqlora_pipelines.cli.options import ConfigOrVariable, Set
from spectraqlora_pipelines.cli.registry import Uri, registry_settings
from spectraqlora_pipelines.cli.screen import console, line

if TYPE_CHECKING:
    from spectraqlora.tracking.needs import Needs

    from spectraqlora_pipelines.retention.plan import Entry, Guard, Plan

Places = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PLACE]...",
        help="Workdir, folder of workdirs, the cache, or s3:// address; else runs and the cache.",
        show_default=False,
    ),
]
OlderThan = Annotated[
    str, typer.Option(metavar="AGE", help="Only what nobody wrote to for so long, such as 12h or 30d.")
]
Delete = Annotated[bool, typer.Option("--delete", help="Delete what is listed; without it nothing is.")]
Unknown = Annotated[bool, typer.Option("--unknown", help="Take old things that MLflow does not know, too.")]
_DAY = 86_400


def gc(
    places: Places = None,
    uri: Uri = "",
    config: ConfigOrVariable = None,
    set_: Set = None,
    older_than: OlderThan = "30d",
    unknown: Unknown = False,
    delete: Delete = False,
) -> None:
    """List or delete what no run, version or alias needs.

    Artifacts, exports and checkpoints, in workdirs, in the cache and in buckets,
    where MLflow says what is needed. Without --delete it only lists. What it does
    not know it leaves alone, and says how much that is.

    Example: spectraqlora gc s3://mlpipeline/v2/artifacts --uri http://mlflow:5000
    """
    from spectraqlora_pipelines.retention.plan import Guard, Plan

    guard = Guard(time.time(), _seconds(older_than), older_than)
    plan = Plan()
    for place in places or [*(["runs"] if Path("runs").is_dir() else []), str(cache_folder())]:
        if place.startswith("s3://"):
            _plan_bucket(plan, place, registry_settings(uri, "", config, set_).tracking, guard, unknown)
        else:
            _plan_folder(plan, Path(place).expanduser().absolute(), guard)
    _show(plan, guard.now)
    if not plan.entries:
        return
    if delete:
        _delete(plan.entries)
        return
    again = ["spectraqlora", "gc", *(places or []), *(["--uri", uri] if uri else [])]
    again += ["--config", str(config)] if config else []
    again += [part for assignment in set_ or [] for part in ("--set", assignment)]
    again += ["--older-than", older_than, *(["--unknown"] if unknown else []), "--delete"]
    line(f"Nothing is deleted yet. This deletes them: {shlex.join(again)}")


def _seconds(age: str) -> int:
    units = {"m": 60, "h": 3600, "d": _DAY, "w": 7 * _DAY}
    if not (age[:-1].isdecimal() and age[:-1].isascii() and len(age) < 8 and age[-1] in units):
        raise InputError("--older-than", age, "a number and m, h, d or w, such as 30d")
    return int(age[:-1]) * units[age[-1]]


def _plan_bucket(plan: Plan, place: str, tracking: TrackingSettings, guard: Guard, unknown: bool) -> None:
    from spectraqlora.storage import Connection, list_objects, parse_address
    from spectraqlora.tracking.needs import read_needs

    from spectraqlora_pipelines.retention.bucket import Bucket

    connection = Connection()
    address = parse_address(place, "PLACE")
    with console.status("reading the bucket and MLflow"):
        # MLflow is asked last: whatever it says is at least as new as the listing.
        bucket = Bucket(list_objects(address, connection), connection)
        plan.add(bucket.plan(read_needs(tracking), guard, unknown))


def _plan_folder(plan: Plan, place: Path, guard: Guard) -> None:
    from spectraqlora_pipelines.retention.cache import plan_cache
    from spectraqlora_pipelines.retention.workdirs import plan_workdir, workdirs

    if place == cache_folder().absolute():
        plan_cache(plan, place, guard)
        return
    with console.status("reading the work directories"):
        for workdir in workdirs(place):
            plan_workdir(plan, workdir, _needs_of, guard)


def _needs_of(workdir: Path, settings: dict[str, Any]) -> Needs:
    """What the MLflow says that a workdir's run has sent its results to, whichever --uri names."""
    from spectraqlora.tracking.needs import Needs, read_needs

    own = str(settings.get("tracking", {}).get("uri", ""))
    if "://" in own:
        return read_needs(TrackingSettings(uri=own))
    if (workdir / "mlflow.db").is_file():
        return read_needs(TrackingSettings(uri=f"sqlite:///{plainly_named(workdir)}/mlflow.db"))
    return Needs()


def _show(plan: Plan, now: float) -> None:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in plan.entries:
        groups.setdefault((entry.what, entry.reason), []).append(entry)
    for (what, reason), entries in groups.items():
        line(f"{what}: {reason}", style="bold")
        for entry in sorted(entries, key=lambda each: -each.size):
            line(f"{size(entry.size):>10} {age(now - entry.modified):>6}  {entry.place}")
    for reason, kept in sorted(plan.kept.items()):
        such = f", such as {kept.first}" if kept.count > 1 else f": {kept.first}"
        line(f"Stays: {kept.count}, {size(kept.size)}: {reason}{such}")
    total = sum(entry.size for entry in plan.entries)
    line(f"Can go: {len(plan.entries)}, {size(total)}." if plan.entries else "Nothing can go.")


def _delete(entries: list[Entry]) -> None:
    freed = 0
    try:
        for entry in entries:
            entry.remove()
            freed += entry.size
            line(f"Deleted {entry.place}")
    finally:
        line(f"Deleted in all: {size(freed)}.")


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def age(seconds: float) -> str:
    """Time since something was written, as people read it."""
    hours = max(0, seconds) / 3600
    return f"{hours / 24:.0f} d" if hours >= 48 else f"{hours:.0f} h"
