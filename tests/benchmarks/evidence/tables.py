"""Tables of the study's raw results, as Markdown.

    python -m tests.benchmarks.evidence.tables NAME RESULTS [RESULTS]

RESULTS is a results.json, or the name of one that is kept here, such as techdocs-7m-gsm8k. `page README.md` writes every
table of a page anew below its command.

A difference is paired with the table's reference arm: the mean over the seeds that both have, ± its standard error
across seeds, and by row (of the mean over seeds of a row's losses). Below zero is better.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectraqlora.scoring.statistics import difference_stderr

from tests.benchmarks.evidence.arms import CURVES, GRADIENT, HYBRID, SGM, TABLES, Table, arms

KEPT = Path(__file__).with_name("results")
_END = "<!-- end of the table -->"
_ON_PAGE = re.compile(
    rf"^( {{4}}python -m tests\.benchmarks\.evidence\.tables (.+))\n[\s\S]*?{_END}", re.MULTILINE
)


@dataclass(frozen=True)
class Results:
    """Raw results of a study, as `runs.Runs.write_results` writes them."""

    about: Mapping[str, Any]
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]]
    """By arm and seed."""

    @classmethod
    def read(cls, name: str) -> Results:
        """From a file, or of a name among those that are kept."""
        path = Path(name) if Path(name).is_file() else KEPT / f"{name}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        runs: dict[str, dict[int, Mapping[str, Any]]] = {}
        for run in content.pop("runs"):
            runs.setdefault(run["arm"], {})[run["seed"]] = run
        return cls(content, runs)

    def parameters(self, arm: str) -> float:
        """Trained parameters, mean over seeds: sgm's groups differ a little."""
        return statistics.mean(run["trained_parameters"] for run in self.runs[arm].values())

    def loss(self, arm: str) -> float:
        """Mean test loss over seeds, nats per token."""
        return statistics.mean(run["test_loss"] for run in self.runs[arm].values())


@dataclass(frozen=True)
class Difference:
    """An arm's mean test loss minus that of another one, nats per token."""

    mean: float
    across_seeds: float | None
    """Standard error over seeds; none with one seed."""
    by_row: float

    def __str__(self) -> str:
        seeds = "" if self.across_seeds is None else f" ± {self.across_seeds:.4f}"
        return f"{self.mean:+.4f}{seeds} (rows ± {self.by_row:.4f})"


def paired(results: Results, arm: str, reference: str) -> Difference | None:
    """The difference between two arms on the same rows with the same seeds; none where they have no seed in common."""
    own, other = results.runs[arm], results.runs.get(reference, {})
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    gaps = [own[seed]["test_loss"] - other[seed]["test_loss"] for seed in seeds]
    first, second = (
        [statistics.mean(losses) for losses in zip(*(side[s]["row_losses"] for s in seeds), strict=True)]
        for side in (own, other)
    )
    across = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return Difference(
        statistics.mean(gaps), across, difference_stderr(first, second, results.about["row_tokens"])
    )


def table(shown: Table, studies: Sequence[Results]) -> str:
    """Arms in the order of their loss in the first study; columns by study."""
    names = [arm.name for arm in shown.arms if all(arm.name in study.runs for study in studies)]
    names.sort(key=studies[0].loss)
    head = ["arm"]
    for study in studies:
        task = study.about["task"]
        head += ["trained parameters", f"{task}: test loss", f"against {shown.reference}", "seeds"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in names:
        cells = [name]
        for study in studies:
            gap = None if name == shown.reference else paired(study, name, shown.reference)
            cells += [
                f"{study.parameters(name):,.0f}",
                f"{study.loss(name):.4f}",
                "" if gap is None else str(gap),
                str(len(study.runs[name])),
            ]
        lines.append(_row(cells))
    return "\n".join([*lines, "", *(f"{_about(study, names)}" for study in studies)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _about(study: Results, names: Sequence[str]) -> str:
    about, by_name = study.about, arms(list(TABLES))
    rows = about["rows"]
    steps = "/".join(
        str(about["steps"] * count) for count in sorted({by_name[name].lengths for name in names})
    )
    rates = {by_name[name].tuned_as: next(iter(study.runs[name].values()))["rate"] for name in names}
    grouped: dict[float, list[str]] = {}
    for name, rate in rates.items():
        grouped.setdefault(rate, []).append(name)
    chosen = "; ".join(f"{rate:g}: {', '.join(sorted(members))}" for rate, members in sorted(grouped.items()))
    return (
        f"- {about['task']}, {about['model']}: {steps} steps of {about['batch_size']} rows; "
        f"{rows['train']:,} rows to train on, {rows['held_out']} held out, {rows['test']} of the test, "
        f"{rows['rates']:,} for the rates; {rows['too_long_share']:.0%} longer than {about['max_length']} tokens, dropped; "
        f"the base's test loss is {about['base_test_loss']:.4f}. Rates: {chosen}."
    )


def parameters_at(results: Results, curve: Sequence[str], loss: float) -> float | None:
    """Trained parameters at which a curve has a loss, on straight lines over the logarithm of the parameters.

    None where no two neighbouring points have the loss between them.
    """
    points = sorted((results.parameters(name), results.loss(name)) for name in curve if name in results.runs)
    for (fewer, above), (more, below) in itertools.pairwise(points):
        if above >= loss >= below and above > below:
            share = (above - loss) / (above - below)
            return math.exp(math.log(fewer) + share * (math.log(more) - math.log(fewer)))
    return None


def at_equal_loss(results: Results) -> str:
    """What qlora and sgm train at the loss that hybrid has at each of its ranks."""
    curves = {name: [arm.name for arm in members] for name, members in CURVES.items()}
    lines = []
    for name in sorted((n for n in curves[HYBRID] if n in results.runs), key=results.parameters):
        trained, cells = results.parameters(name), []
        for other in (GRADIENT, SGM):
            needed = parameters_at(results, curves[other], results.loss(name))
            cells.append(
                "beyond its curve" if needed is None else f"{needed:,.0f} ({needed / trained - 1:+.0%})"
            )
        lines.append(
            _row([results.about["task"], name, f"{results.loss(name):.4f}", f"{trained:,.0f}", *cells])
        )
    head = ["task", "loss of", "test loss", "it trains", f"{GRADIENT} trains", f"{SGM} trains"]
    return "\n".join([_row(head), _row(["---"] * len(head)), *lines])


def shown(command: str) -> str:
    """What is printed for the arguments of the command: a table's name, and names of results."""
    name, *results = command.split()
    studies = [Results.read(result) for result in results]
    if name == "equal-loss":
        return "\n\n".join(at_equal_loss(study) for study in studies)
    return table(TABLES[name], studies)


def renewed(page: str) -> str:
    """A page with what its commands print below each of them, up to the mark that ends it."""
    return _ON_PAGE.sub(lambda found: f"{found[1]}\n\n{shown(found[2])}\n{_END}", page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*TABLES, "equal-loss", "page"])
    parser.add_argument(
        "results", nargs="+", help="for page: a Markdown file, whose tables are printed anew into it"
    )
    options = parser.parse_args()
    if options.name == "page":
        for path in map(Path, options.results):
            path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(shown(" ".join([options.name, *options.results])))


if __name__ == "__main__":
    main()
