"""The step's work: order the branches, pass the winner on, and draw the report; all from artifacts alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from spectraqlora.artifacts import Evaluation, ModelOutline, PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import write_text
from spectraqlora.report import plots
from spectraqlora.report.page import render_report
from spectraqlora.runtime.step import MADE_FROM
from spectraqlora.snr.table import FILENAME, HEATMAP, read_table
from spectraqlora.steps.compare.leaderboard import against_best, order_by_loss, winning_method


@dataclass(frozen=True)
class Inputs:
    """The folders that the step reads; evaluations and adapters by the name of the method's parameter."""

    outline: Path
    rows: Path
    table: Path
    evaluations: Mapping[str, Path]
    adapters: Mapping[str, Path]


@dataclass(frozen=True)
class Comparison:
    """All branches, best first, and the method that won."""

    best_first: list[Evaluation]
    winner: str


def compare(inputs: Inputs, leaderboard: Path, winner: Path, report: Path) -> Comparison:
    """Write the leaderboard with all evaluations and plots, the winner's adapter and evaluation, and the report.

    Args:
        inputs: what is read.
        leaderboard: folder for `leaderboard.json`, the plots, the SNR table and each branch's evaluation.
        winner: folder for the winner's `adapter/` and evaluation.
        report: the HTML page, a file.

    Raises:
        InputError: no branch at all, a branch given in the place of another, branches of different base models
            or rows, or no adapter of the winner.
    """
    evaluations = [_read(method, folder) for method, folder in inputs.evaluations.items()]
    best_first = order_by_loss(evaluations)
    result = Comparison(best_first, winning_method(best_first))
    if result.winner not in inputs.adapters:
        raise InputError(f"{result.winner}_adapter", "nothing", "the adapter of the branch that won")
    tests = against_best(best_first)
    board = {
        "winner": result.winner,
        "order": [e.method for e in best_first],
        "against_best": {name: {**asdict(test), "tied": test.tied} for name, test in tests.items()},
    }
    write_text(leaderboard / "leaderboard.json", json.dumps(board, indent=1))
    for entry in best_first:
        entry.write(leaderboard / entry.method)
        if entry.method == result.winner:
            entry.write(winner)
    leave_out = shutil.ignore_patterns(MADE_FROM)
    shutil.copytree(inputs.adapters[result.winner], winner / "adapter", ignore=leave_out)
    table = read_table(inputs.table)
    pictures = plots.draw(best_first, table, result.winner)
    plots.write_plots(pictures, leaderboard / "plots")
    (leaderboard / "snr").mkdir()
    for name in (FILENAME, HEATMAP):
        shutil.copy(inputs.table / name, leaderboard / "snr")
    outline, rows = ModelOutline.read(inputs.outline), PreparedRows.read(inputs.rows)
    write_text(report, render_report(best_first, table, outline, rows, result.winner, tests, pictures))
    return result


def _read(method: str, folder: Path) -> Evaluation:
    evaluation = Evaluation.read(folder)
    if evaluation.method != method:
        raise InputError(method, folder, f"the evaluation of {method}; it is that of {evaluation.method}")
    return evaluation
