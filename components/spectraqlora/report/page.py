"""The report: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, ModelOutline, PreparedRows
from spectraqlora.methods.catalogue import method
from spectraqlora.report import plots
from spectraqlora.scoring.statistics import SIGNIFICANCE, PairedTest

if TYPE_CHECKING:
    import pandas as pd

EXAMPLE_CHARACTERS = 2000
"""Longer examples are cut on the page."""


def render_report(
    evaluations: Sequence[Evaluation],
    snr_table: pd.DataFrame,
    outline: ModelOutline,
    rows: PreparedRows,
    winner: str,
    tests: Mapping[str, PairedTest],
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The page: leaderboard, data, curves, SNR, where each method trained, similarity, cost, rounds, settings.

    Everything that comes from data, models or settings is escaped; the page refers to nothing outside itself.

    Args:
        evaluations: all branches, best first.
        snr_table: before training, as `snr.table.read_table` gives it.
        outline: of the base model.
        rows: manifest of the prepared rows.
        winner: method name; one of the evaluations'.
        tests: every method against the best, by name: what decided the ties.
        pictures: what `plots.draw` made of the same evaluations; drawn here where it is not given.
    """
    best = next(e for e in evaluations if e.method == winner)
    similarity = next((e.similarity for e in evaluations if e.similarity is not None), None)
    drawn = plots.draw(evaluations, snr_table, winner) if pictures is None else pictures
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            evaluations=evaluations,
            best=best,
            tests=tests,
            significance=SIGNIFICANCE,
            controls=[e.method for e in evaluations if method(e.method).control],
            outline=outline,
            rows=rows,
            examples=[_example(text, rows) for text in rows.examples],
            pictures={name: Markup(svg) for name, svg in drawn.items()},
            similarity=similarity,
            sharing=sum(len(g) for g in similarity.groups if len(g) > 1) if similarity else 0,
            settings=list(_flat({**best.settings, "train": best.rounds[-1].training.settings})),
            version=__version__,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": _share, "change": _change, "count": "{:,}".format}
    environment.globals["colour"] = plots.colour
    return environment


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _change(value: float, reference: float) -> str:
    """How far a value is from its reference, as a signed share of it."""
    return f"{value / reference - 1:+.1%}" if reference else "–"


def _example(text: str, rows: PreparedRows) -> tuple[str, str]:
    """(context, learned part) of an example; the second is empty where it is not known.

    Plain text is learned from end to end. Of a row with a short answer the manifest says prompt and answer;
    the prompt there may carry a special token that the example does not show.
    """
    if rows.layout == "text":
        return "", _cut(text)
    for pair in rows.answers:
        context = text.removesuffix(pair["answer"])
        if context != text and context.strip() and context.strip() in pair["prompt"]:
            return _cut(context), _cut(pair["answer"])
    return _cut(text), ""


def _cut(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]} …"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every setting."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
