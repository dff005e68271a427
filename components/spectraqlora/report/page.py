"""The report: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.artifacts import Evaluation, MergedModel
from spectraqlora.files import write_text
from spectraqlora.report import plots

if TYPE_CHECKING:
    import pandas as pd

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2430;max-width:1080px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
.lead{font-size:1.05rem;color:#3b4252}.note{color:#667;font-size:.9rem;margin:.2rem 0 .6rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid #e5e9f0;text-align:right}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:#556}
tr.winner td{background:#eaf6ee;font-weight:600}
svg{max-width:100%;height:auto}code{font-size:.85em;overflow-wrap:anywhere}
details td:last-child,details th:last-child{text-align:left}li{margin:.1rem 0}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
"""


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _leaderboard(evaluations: Sequence[Evaluation], winner: str) -> str:
    base = evaluations[0]
    rows = [
        f"<tr><td>base (4-bit)</td><td>{base.base_eval_loss:.4f}</td><td></td><td>{base.base_perplexity:.3f}</td>"
        f"<td>{_percent(base.base_accuracy)}</td><td></td><td></td><td></td><td></td></tr>"
    ]
    for e in evaluations:
        gain = (e.eval_loss / e.base_eval_loss - 1) if e.base_eval_loss else 0.0
        dot = f'<span class="dot" style="background:{plots.COLOURS[e.method]}"></span>'
        rows.append(
            f'<tr class="{"winner" if e.method == winner else ""}"><td>{dot}{e.method}</td>'
            f"<td>{e.eval_loss:.4f} ± {e.eval_loss_stderr:.4f}</td><td>{gain:+.1%}</td><td>{e.perplexity:.3f}</td>"
            f"<td>{_percent(e.accuracy)}</td><td>{e.trainable_parameters:,}</td><td>{e.train_seconds:.1f}</td>"
            f"<td>{e.train_tokens_per_second:,.0f}</td><td>{e.peak_memory_bytes / 2**20:,.0f}</td></tr>"
        )
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            "method",
            "eval loss",
            "vs base",
            "perplexity",
            "accuracy",
            "trained parameters",
            "train seconds",
            "tokens/s",
            "peak MiB",
        )
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _rounds(evaluations: Sequence[Evaluation]) -> str:
    parts = []
    for e in evaluations:
        for r in e.rounds:
            state = f"eval loss {r.eval_loss:.4f}" if r.trained else "not trained again"
            moved = "".join(f"<li><code>{escape(line)}</code></li>" for line in r.changes)
            parts.append(
                f"<details><summary>{e.method}, round {r.round}: {state}; {len(r.rank_map.active())} adapters, "
                f"{len(r.changes)} notes on what comes next</summary><ul>{moved}</ul></details>"
            )
    return "".join(parts)


def _table(values: dict[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    rows = "".join(
        f"<tr><td>{escape(k)}</td><td><code>{escape(str(v))}</code></td></tr>" for k, v in flat.items()
    )
    return f"<table>{rows}</table>"


def write_report(
    path: Path,
    evaluations: Sequence[Evaluation],
    snr_table: pd.DataFrame,
    settings: dict[str, Any],
    digests: dict[str, str],
    winner: str,
    merged: MergedModel | None = None,
) -> None:
    """Write the page: leaderboard, curves, SNR and rank maps, similarity, cost, settings.

    Args:
        path: of the page.
        evaluations: all branches, best first.
        snr_table: before training.
        settings: nested settings of the run.
        digests: what identifies base, data and code.
        winner: method name.
        merged: the exported model, for its two losses.
    """
    names = {row.module: (int(row.layer), str(row.type)) for row in snr_table.itertuples()}
    before = {row.module: float(row.snr) for row in snr_table.itertuples()}
    best = next(e for e in evaluations if e.method == winner)
    sgm = next((e.similarity for e in evaluations if e.similarity is not None), None)
    model = escape(str(settings.get("model", {}).get("base_model", "")))
    gain = 1 - best.eval_loss / best.base_eval_loss
    verdict = (
        f"<b>{winner}</b> won among {len(evaluations)} methods: eval loss {best.base_eval_loss:.3f} to "
        f"{best.eval_loss:.3f} ({gain:.0%} lower) on {best.eval_rows} held-out rows"
    )
    if best.accuracy is not None:
        verdict += f", exact answers {_percent(best.base_accuracy)} to {_percent(best.accuracy)}"
    verdict += f", training {best.trainable_parameters:,} parameters."
    if merged is not None:
        verdict += (
            f" Exported: merged into the {merged.merged_into} weights "
            f"(loss {merged.eval_loss_original:.4f} original, {merged.eval_loss_quantized:.4f} dequantized)."
        )
    similar = ""
    if sgm is not None:
        shared = sum(len(g) for g in sgm.groups if len(g) > 1)
        similar = (
            f"<h2>SGM: whose gradients agree</h2><p class=note>{len(sgm.modules)} candidates in {len(sgm.groups)} "
            f"groups; {shared} modules share an update. Grey: different shape, not compared.</p>"
            f"{plots.similarity_matrix(sgm)}"
        )
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>SpectraQLoRA: {model}</title><style>{_STYLE}</style></head>
<body><h1>Which layers earned their training?</h1><p class=lead>{verdict}</p>
<h2>Leaderboard</h2>{_leaderboard(evaluations, winner)}
<p class=note>Losses in nats per token, ± standard error over rows; the same rows for all. Ties within the best
one's standard error go to fewer trained parameters.</p>
<h2>Loss</h2><p class=note>Bold with dots: held-out rows. Thin: training batches.</p>{plots.loss_curves(evaluations)}
<h2>Signal-to-noise ratio</h2><p class=note>Compare within a row: the raw value depends on a type's shape.</p>
{plots.snr_maps(names, before, best.snr_after)}
<h2>Where each method trained</h2><p class=note>The number is the LoRA rank; blank cells stayed frozen; gN marks
modules that share group N's update.</p>{plots.rank_maps(evaluations, names)}
{similar}
<h2>Cost</h2>{plots.cost_bars(evaluations)}
<h2>Rounds</h2>{_rounds(evaluations)}
<h2>Settings and digests</h2><details open><summary>Digests</summary>{_table(digests)}</details>
<details><summary>Settings</summary>{_table(settings)}</details></body></html>"""
    write_text(path, page)
