"""The report's pictures, as SVG text."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectraqlora.artifacts import Evaluation, RankMap, Similarity
from spectraqlora.files import write_text
from spectraqlora.methods import catalogue

if TYPE_CHECKING:
    import pandas as pd

_MISSING = "#eceff4"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    # The same evaluations give the same page, byte for byte.
    "svg.hashsalt": "spectraqlora",
}


def colour(method: str) -> str:
    """The method's colour, the same in every picture."""
    return catalogue.method(method).colour


def draw(evaluations: Sequence[Evaluation], snr_table: pd.DataFrame, winner: str) -> dict[str, str]:
    """The report's pictures by name: loss, snr, ranks, cost; similarity and groups where a branch made groups.

    Args:
        evaluations: all branches, best first.
        snr_table: before training.
        winner: method name.
    """
    names = {row.module: (int(row.layer), str(row.type)) for row in snr_table.itertuples()}
    before = {row.module: float(row.snr) for row in snr_table.itertuples()}
    best = next(e for e in evaluations if e.method == winner)
    drawn = {
        "loss": loss_curves(evaluations),
        "snr": snr_maps(names, before, best.snr_after),
        "ranks": rank_maps(evaluations, names),
        "cost": cost_bars(evaluations),
    }
    for entry in evaluations:
        if entry.similarity is not None:
            drawn["similarity"] = similarity_matrices(entry.similarity)
            drawn["groups"] = group_map(entry.rounds[-1].rank_map, names)
    return drawn


def write_plots(drawn: Mapping[str, str], folder: Path) -> None:
    """Write what `draw` drew as SVG files, each under its name."""
    for name, svg in drawn.items():
        write_text(folder / f"{name}.svg", svg)


def _figure(width: float, height: float) -> Any:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mpl.rcParams.update(_STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def loss_curves(evaluations: Sequence[Evaluation]) -> str:
    """Training loss (thin), eval loss (bold) of every branch over optimizer steps; the base dashed."""
    figure = _figure(10, 4)
    axes = figure.subplots()
    for entry in evaluations:
        offset = 0
        train: list[tuple[int, float]] = []
        evals: list[tuple[int, float]] = [(0, entry.base_eval_loss)]
        for result in entry.rounds:
            log = result.training
            train += [(step + offset, loss) for step, loss in log.loss_curve]
            evals += [(step + offset, loss) for step, loss in log.eval_curve]
            offset = max([offset, *(step for step, _ in train + evals)])
        line = {"color": colour(entry.method)}
        if train:
            axes.plot(*zip(*train, strict=True), alpha=0.3, linewidth=1, **line)
        axes.plot(*zip(*evals, strict=True), marker="o", markersize=4, label=entry.method, **line)
    axes.axhline(
        evaluations[0].base_eval_loss, color="#999", linestyle="--", linewidth=1, label="base (4-bit)"
    )
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _svg(figure)


def _grid(
    values: dict[str, float], names: dict[str, tuple[int, str]]
) -> tuple[np.ndarray, list[str], list[int]]:
    types = list(dict.fromkeys(kind for _, kind in names.values()))
    layers = sorted({layer for layer, _ in names.values()})
    grid = np.full((len(types), len(layers)), np.nan)
    for module, value in values.items():
        if module in names:
            layer, kind = names[module]
            grid[types.index(kind), layers.index(layer)] = value
    return grid, types, layers


def _plain(name: str) -> str:
    """A name as matplotlib takes it: a $ in it is a $, and begins no formula."""
    return name.replace("$", "\\$")


def _cells(axes: Any, grid: np.ndarray, types: list[str], layers: list[int], title: str, **style: Any) -> Any:
    from matplotlib import colormaps

    cmap = style.pop("cmap")
    cmap = (colormaps[cmap] if isinstance(cmap, str) else cmap).with_extremes(bad=_MISSING)
    shown = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap=cmap, **style)
    axes.set_yticks(range(len(types)), [_plain(name) for name in types])
    every = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("layer")
    return shown


def snr_maps(
    names: dict[str, tuple[int, str]], before: dict[str, float], after: dict[str, float | None]
) -> str:
    """SNR by layer and module type before and after training, on one logarithmic scale; ∞ is marked."""
    from matplotlib.colors import LogNorm

    clean = {k: v for k, v in after.items() if v is not None}
    finite = [v for v in [*before.values(), *clean.values()] if math.isfinite(v) and v > 0] or [0.1, 1.0]
    norm = LogNorm(min(finite), max(max(finite), min(finite) * 1.01))
    _, types, layers = _grid(before, names)
    figure = _figure(10, 1.5 + 0.28 * len(types))
    left, right = figure.subplots(1, 2, sharey=True)
    shown = None
    for axes, values, title in ((left, before, "before training"), (right, clean, "after training (winner)")):
        grid, types, layers = _grid(values, names)
        shown = _cells(
            axes, np.where(np.isfinite(grid), grid, np.nan), types, layers, title, norm=norm, cmap="viridis"
        )
        for row, column in zip(*np.where(np.isinf(grid)), strict=True):
            axes.text(column, row, "∞", ha="center", va="center")
    figure.colorbar(shown, ax=[left, right], label="SNR (log scale)")
    return _svg(figure)


def rank_maps(evaluations: Sequence[Evaluation], names: dict[str, tuple[int, str]]) -> str:
    """Every method's last trained rank map over the same grid; cells of a group carry its number."""
    maps: list[RankMap] = [e.rounds[-1].rank_map for e in evaluations]
    highest = max(m.rank for rank_map in maps for m in rank_map.modules)
    _, types, layers = _grid({}, names)
    lines = (len(maps) + 1) // 2
    figure = _figure(10, lines * (1.1 + 0.26 * len(types)))
    panels = figure.subplots(lines, 2, sharey=True, squeeze=False).flatten()
    shown = None
    for axes, rank_map in zip(panels, maps, strict=False):
        grid, types, layers = _grid({m.module: float(m.rank) for m in rank_map.modules if m.rank}, names)
        shown = _cells(
            axes,
            grid,
            types,
            layers,
            f"{rank_map.method}: {len(rank_map.active())} matrices",
            vmin=0,
            vmax=highest,
            cmap="Blues",
        )
        for module in rank_map.active():
            if module.module not in names or len(layers) > 40:
                continue
            layer, kind = names[module.module]
            column, row = layers.index(layer), types.index(kind)
            sizes = sum(1 for m in rank_map.modules if m.group == module.group and m.group is not None)
            text = f"{module.rank}" + (f"·g{module.group}" if sizes > 1 else "")
            ink = "white" if module.rank > 0.6 * highest else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)
    figure.colorbar(shown, ax=list(panels), label="LoRA rank")
    return _svg(figure)


def similarity_matrices(similarity: Similarity) -> str:
    """Overlap of gradient subspaces for each side, or gradient cosines; ordered by group, groups of two and more outlined."""
    if not similarity.sides:
        return _matrices(
            similarity.groups,
            [("gradient cosine", similarity.modules, similarity.cosines)],
            {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"},
        )
    panels = [
        (f"{side.side} side, chance {side.chance:.2f}", side.modules, side.overlaps)
        for side in similarity.sides
    ]
    return _matrices(similarity.groups, panels, {"vmin": 0, "vmax": 1, "cmap": "Purples"})


def _matrices(
    groups: Sequence[Sequence[str]],
    panels: Sequence[tuple[str, Sequence[str], Sequence[Sequence[float | None]]]],
    style: dict[str, Any],
) -> str:
    """Panels of (title, modules, a value for every pair of them) next to each other."""
    from matplotlib.patches import Rectangle

    longest = max(len(modules) for _, modules, _ in panels)
    side = min(10.0, 3.2 + 0.17 * longest)
    figure = _figure(min(10.0, side * len(panels)), min(side, 10.0 / len(panels)) * 0.85)
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, modules, values) in zip(every_axes, panels, strict=True):
        index = {name: i for i, name in enumerate(modules)}
        here = [group for group in groups if all(name in index for name in group)]
        grouped = {name for group in here for name in group}
        order = [name for group in here for name in group] + [n for n in modules if n not in grouped]
        matrix = np.array([[values[index[a]][index[b]] for b in order] for a in order], dtype=float)
        labels = order if len(order) <= 48 and len(panels) == 1 else []
        shown = _cells(axes, matrix, labels, [], title, **style)
        axes.set_xlabel("")
        start = 0
        for group in here:
            if len(group) > 1:
                axes.add_patch(
                    Rectangle((start - 0.5, start - 0.5), len(group), len(group), fill=False, linewidth=1.6)
                )
            start += len(group)
        axes.tick_params(axis="y", labelsize=7)
    figure.colorbar(shown, ax=list(every_axes), shrink=0.7)
    return _svg(figure)


def group_map(rank_map: RankMap, names: dict[str, tuple[int, str]]) -> str:
    """The model's matrices by layer and type: what shares a factor has one colour and its name; grey has no adapter."""
    sizes = Counter(m.group for m in rank_map.active() if m.group is not None)
    number = {group: place for place, group in enumerate(g for g, size in sizes.items() if size > 1)}
    entries = {m.module: m for m in rank_map.active() if m.module in names}
    # Alone is white, colours repeat after nine.
    values = {n: 1.0 + number[m.group] % 9 if m.group in number else 0.0 for n, m in entries.items()}
    grid, types, layers = _grid(values, names)
    figure = _figure(10, 1.0 + 0.28 * len(types))
    axes = figure.subplots()
    _cells(axes, grid, types, layers, "shared factors", vmin=0, vmax=9, cmap=_groups_colours())
    for name, entry in entries.items():
        if entry.group in number and len(layers) <= 40:
            layer, kind = names[name]
            what = {"pair": "A, B"}.get(entry.shared, entry.shared)
            place = layers.index(layer), types.index(kind)
            axes.text(*place, f"{what}·g{entry.group}", ha="center", va="center", fontsize=7)
    return _svg(figure)


def _groups_colours() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(np.vstack([np.ones((1, 4)), colormaps["Set3"](np.arange(9))]))


def cost_bars(evaluations: Sequence[Evaluation]) -> str:
    """Peak memory, speed and trainable parameters of every branch."""
    figure = _figure(10, 0.8 + 0.3 * len(evaluations))
    names = [e.method for e in evaluations]
    series = (
        ("peak memory, MiB", [e.peak_memory_bytes / 2**20 for e in evaluations]),
        ("training speed, tokens per second", [e.train_tokens_per_second for e in evaluations]),
        ("trainable parameters, thousands", [e.trainable_parameters / 1e3 for e in evaluations]),
    )
    for axes, (title, values) in zip(figure.subplots(1, 3, sharey=True), series, strict=True):
        bars = axes.barh(names, values, color=[colour(n) for n in names])
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlim(0, max(values) * 1.25 or 1)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()
    return _svg(figure)
