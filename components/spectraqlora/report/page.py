"""The report: one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, Example, ModelOutline, PreparedRows
from spectraqlora.data.accounting import facts, warning
from spectraqlora.errors import printable
from spectraqlora.methods.catalogue import method
from spectraqlora.methods.ranks import cost, trained_parameters
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
    merging = next((e for e in evaluations if e.similarity is not None), None)
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
            **_data(rows),
            pictures={name: Markup(svg) for name, svg in drawn.items()},
            similarity=merging.similarity if merging else None,
            sharing=_sharing(merging, outline) if merging else None,
            settings=list(_flat({**best.settings, "train": best.rounds[-1].training.settings})),
            version=__version__,
        )
    )


def render_data_page(rows: PreparedRows, base: str) -> str:
    """A page about the data alone: what was read, kept and dropped, and examples with the learned part marked.

    Args:
        rows: manifest of the prepared rows.
        base: name of the base model.
    """
    return (
        _environment().get_template("data.html.j2").render(rows=rows, base=base, **_data(rows, opened=True))
    )


def _data(rows: PreparedRows, opened: bool = False) -> dict[str, Any]:
    """What the data block shows; its examples folded or not."""
    examples = [_example(example) for example in rows.examples]
    return {"facts": facts(rows), "warning": warning(rows), "examples": examples, "opened": opened}


def _sharing(merging: Evaluation, outline: ModelOutline) -> dict[str, Any]:
    """What a branch's groups share, and how many of its parameters that saves."""
    rank_map, infos = merging.rounds[-1].rank_map, {m.module: m for m in outline.modules}
    trained = [m for m in rank_map.trained() if m.module in infos]
    sizes = Counter(m.group for m in trained if m.group is not None)
    members = [m for m in trained if m.group is not None and sizes[m.group] > 1]
    groups = Counter(shared for _, shared in {(m.group, m.shared) for m in members})
    alone = sum(m.rank * cost(infos[m.module]) for m in trained)
    spent = trained_parameters(trained, outline.modules)
    return {
        "method": merging.method,
        "groups": groups,
        "modules": len(members),
        "alone": alone,
        "spent": spent,
    }


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": _share, "change": _change, "count": "{:,}".format}
    environment.globals["colour"] = plots.colour
    return environment


def _shown(value: Any) -> Any:
    """What a place of the template gets: text without control characters, which a saved page would bring to a terminal."""
    return type(value)(printable(value)) if isinstance(value, str) else value


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _change(value: float, reference: float) -> str:
    """How far a value is from its reference, as a signed share of it."""
    return f"{value / reference - 1:+.1%}" if reference else "–"


def _example(example: Example) -> Example:
    """A rendered row's pieces, of which the page shows the first characters."""
    shown, room = [], EXAMPLE_CHARACTERS
    for text, learned in example:
        if room > 0:
            shown.append((text if len(text) <= room else f"{text[:room]} …", learned))
        room -= len(text)
    return shown


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every setting."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
