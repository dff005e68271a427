"""Finished runs in a JSON-lines file, processes that add the missing ones, and the learning rate of every arm."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tests.benchmarks.evidence.arms import Arm
from tests.benchmarks.evidence.study import STUDY, TUNING, Study

LEARNING_RATES = (4e-3, 8e-3, 1.6e-2)
"""Where the search for an arm's rate begins; it goes on beyond an end that is the best, by factors of 2."""
LOWEST_RATE, HIGHEST_RATE = 2.5e-4, 6.4e-2
SEEDS = (1, 2, 3)
_TUNING_SEED = 0

Key = tuple[str, float, int, str]
"""Arm, learning rate, seed, and part of the rows of a run."""


def best_rates(
    names: Iterable[str], losses: Callable[[list[tuple[str, float]]], list[float]]
) -> dict[str, float]:
    """The rate of lowest loss of each name: of `LEARNING_RATES`, and beyond an end of them while that end is the best.

    Args:
        names: what is tuned.
        losses: of names with rates; asked for all that is open at once.
    """
    grids = {name: list(LEARNING_RATES) for name in names}
    best: dict[str, float] = {}
    while open_ := [name for name in grids if name not in best]:
        tries = [(name, rate) for name in open_ for rate in grids[name]]
        found = dict(zip(tries, losses(tries), strict=True))
        for name in open_:
            rate = min(grids[name], key=lambda r: found[name, r])
            beyond = {min(grids[name]): rate / 2, max(grids[name]): rate * 2}.get(rate, 0.0)
            if LOWEST_RATE <= beyond <= HIGHEST_RATE:
                grids[name].append(beyond)
            else:
                best[name] = rate
    return best


def _begin_worker() -> None:
    """One thread, and no word, from each worker."""
    import torch

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


class Runs:
    """The runs of a study, in its folder.

    Args:
        study: what runs.
        by_name: its arms.
        jobs: processes of one thread each.
    """

    def __init__(self, study: Study, by_name: Mapping[str, Arm], jobs: int) -> None:
        self.study, self.by_name, self.jobs = study, by_name, jobs
        self._path = study.work / "runs.jsonl"

    def read(self) -> dict[Key, dict[str, Any]]:
        """Results by key."""
        if not self._path.exists():
            return {}
        rows = [json.loads(line) for line in self._path.read_text().splitlines()]
        return {(r["arm"], r["rate"], r["seed"], r["part"]): r for r in rows}

    def complete(self, wanted: Iterable[Key]) -> None:
        """Run what is missing, in the order asked for, and write `results.json` anew after each run."""
        known = self.read()
        missing = [key for key in dict.fromkeys(wanted) if key not in known]
        began = time.monotonic()
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), _begin_worker) as pool:
            pending = [
                pool.submit(self.study.run, self.by_name[name], rate, seed, part)
                for name, rate, seed, part in missing
            ]
            for done, finished in enumerate(as_completed(pending), 1):
                row = finished.result()
                with open(self._path, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                self.write_results()
                left = (time.monotonic() - began) / done * (len(missing) - done)
                loss = row.get("test_loss", row["held_out_loss"])
                print(
                    f"[{done}/{len(missing)}] {row['arm']}, rate {row['rate']:g}, seed {row['seed']}: {loss:.4f}; "
                    f"about {left / 60:.0f} min left",
                    flush=True,
                )

    def rates(self, tuned: Iterable[str]) -> dict[str, float]:
        """The learning rate of every arm named that is best on the tuning rows."""

        def losses(tries: list[tuple[str, float]]) -> list[float]:
            keys = [(name, rate, _TUNING_SEED, TUNING) for name, rate in tries]
            self.complete(keys)
            known = self.read()
            return [known[key]["held_out_loss"] for key in keys]

        return best_rates(tuned, losses)

    def compare(self, names: Iterable[str], rates: Mapping[str, float], seed: int) -> None:
        """Every arm named with one seed."""
        members = [self.by_name[name] for name in names]
        self.complete((arm.name, rates[arm.tuned_as], seed, STUDY) for arm in members)

    def write_results(self) -> None:
        """What the tables are made of, as `results.json`: raw losses by row and run, and what they are of."""
        known = self.read()
        about = json.loads((self.study.work / "about.json").read_text(encoding="utf-8"))
        runs = [
            {k: v for k, v in row.items() if k != "part"} for key, row in known.items() if key[3] == STUDY
        ]
        tuning = [[key[0], key[1], row["held_out_loss"]] for key, row in known.items() if key[3] == TUNING]
        head = json.dumps({**about, "tuning": tuning}, separators=(",", ":"))[:-1]
        lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
        text = f'{head},"runs":[\n{lines}\n]}}\n'
        (self.study.work / "results.json").write_text(text, encoding="utf-8")
