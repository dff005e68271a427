"""What can go in the user's cache: copies of models and data, notes of scans, older samples, links to nowhere."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from spectraqlora.runtime.threads import steps_at_work

from spectraqlora_pipelines.retention.plan import Entry, Guard, Plan
from spectraqlora_pipelines.retention.workdirs import measured, remove

FOREIGN = "nothing that this program put into its cache"
CURRENT = "the newest offline sample"
_SAMPLE = re.compile(r"sample-v(\d+)")
IN_USE = "steps are at work on this machine, and may read it"
LINKED = "a second name of a work directory that is there"


def plan_cache(plan: Plan, cache: Path, guard: Guard) -> None:
    """Add what can go in the cache, and what stays.

    Args:
        plan: what is added to.
        cache: the folder; it need not exist.
        guard: what is too young to go.
    """
    at_work = steps_at_work() > 0
    samples = [int(match[1]) for path in cache.glob("sample-v*") if (match := _SAMPLE.fullmatch(path.name))]
    for folder in sorted(cache.glob("*")):
        kinds = {"s3": "a copy from object storage", "snr": "rows of a scan that was stopped"}
        if folder.name in kinds and folder.is_dir():
            for each in sorted(folder.iterdir()):
                _add(
                    plan,
                    each,
                    kinds[folder.name],
                    "not used since; it is made again when it is",
                    guard,
                    at_work,
                )
        elif folder.name == "folders" and folder.is_dir():
            for link in sorted(folder.iterdir()):
                if link.exists():
                    plan.keep(link, 0, LINKED)
                else:
                    _add(plan, link, "a link", "the work directory that it names is gone", guard, False)
        elif _SAMPLE.fullmatch(folder.name):
            if folder.name == f"sample-v{max(samples)}":
                plan.keep(folder, measured(folder).size, CURRENT)
            else:
                _add(plan, folder, "an offline sample", "there is a newer one", guard, at_work)
        elif folder.name.startswith(".sample-"):
            _add(plan, folder, "a temporary folder", "left by a process that was killed", guard, at_work)
        else:
            plan.keep(folder, measured(folder).size, FOREIGN)


def _add(plan: Plan, place: Path, what: str, reason: str, guard: Guard, at_work: bool) -> None:
    found = measured(place)
    if at_work:
        plan.keep(place, found.size, IN_USE)
    elif guard.young(found.modified):
        plan.keep(place, found.size, guard.reason)
    else:
        plan.remove(Entry(what, str(place), found.size, found.modified, reason, partial(remove, place)))
