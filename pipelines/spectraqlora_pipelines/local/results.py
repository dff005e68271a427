"""What a local run came to: summary, report, merged model and adapter in its work directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, FourBitModel, MergedModel, PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import write_text
from spectraqlora.settings import Settings


def collect(settings: Settings, workdir: Path, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Gather the steps' artifacts into `summary.json`, `merged/`, `adapter/` and `report.html`.

    Args:
        settings: of the run.
        workdir: of the run.
        more: what the summary says beside.

    Raises:
        InputError: the workdir holds no finished run.
    """
    found = {
        "leaderboard": _newest(workdir, "leaderboard/leaderboard.json"),
        "winner": _newest(workdir, "winner/evaluation.json"),
        "exported": _newest(workdir, "exported/manifest.json"),
        "registered": _newest(workdir, "registered/registered.json"),
        "decision": _newest(workdir, "decision/decision.json"),
        "four_bit": _newest(workdir, "four_bit/manifest.json"),
        "rows": _newest(workdir, "rows/manifest.json"),
    }
    board = json.loads((found["leaderboard"] / "leaderboard.json").read_text())
    evaluations = [Evaluation.read(found["leaderboard"] / method) for method in board["order"]]
    merged = MergedModel.read(found["exported"])
    quantized, data = FourBitModel.read(found["four_bit"]), PreparedRows.read(found["rows"])
    registered = json.loads((found["registered"] / "registered.json").read_text())
    first = evaluations[0]
    for name in ("merged", "adapter"):
        _replace_tree(found["exported"] / name, workdir / name)
    summary: dict[str, Any] = {
        "version": __version__,
        "base": {
            "model": quantized.source,
            "digest": quantized.base_digest,
            "eval_loss": first.base_eval_loss,
            "perplexity": first.base_perplexity,
            "accuracy": first.base_accuracy,
            "parameters": quantized.parameters,
            "four_bit_share": quantized.four_bit_parameters / quantized.parameters,
        },
        "data": {
            "source": data.source,
            "digest": data.digest,
            "train_rows": data.train_rows,
            "eval_rows": data.eval_rows,
            "dropped_long": data.dropped_long,
            "dropped_empty": data.dropped_empty,
        },
        "methods": {e.method: _method_entry(e) for e in evaluations},
        "winner": board["winner"],
        "merged_model": str(workdir / "merged"),
        "adapter": str(workdir / "adapter"),
        "merged_into": merged.merged_into,
        "merged_eval_loss": merged.verified_eval_loss,
        "published": merged.published,
        "registered": registered,
        "promotion": json.loads((found["decision"] / "decision.json").read_text()),
    }
    summary |= more or {}
    write_text(workdir / "summary.json", json.dumps(summary, indent=1))
    report(settings, workdir)
    return summary


def collect_retraining(settings: Settings, workdir: Path) -> dict[str, Any]:
    """What a retraining came to: `summary.json` with what changed and, where something did, what came of it.

    Raises:
        InputError: the workdir holds no finished retraining.
    """
    found = _newest(workdir, "changes/changes.json")
    changes = json.loads((found / "changes.json").read_text())
    if changes["changed"]:
        return collect(settings, workdir, {"changes": changes})
    summary = {"version": __version__, "changes": changes}
    write_text(workdir / "summary.json", json.dumps(summary, indent=1))
    return summary


def report(settings: Settings, workdir: Path) -> Path:
    """Write `report.html`, the page that compare made."""
    path = workdir / "report.html"
    page = _newest(workdir, "leaderboard/leaderboard.json").parent / "report"
    write_text(path, page.read_text(encoding="utf-8"))
    return path


def _method_entry(evaluation: Evaluation) -> dict[str, Any]:
    entry = evaluation.model_dump(
        mode="json",
        include={
            "eval_loss",
            "eval_loss_stderr",
            "perplexity",
            "accuracy",
            "trainable_parameters",
            "train_seconds",
            "train_tokens_per_second",
            "peak_memory_bytes",
        },
    )
    entry["train_tokens"] = sum(r.training.train_tokens for r in evaluation.rounds)
    entry["rounds"] = [
        {
            "round": r.round,
            "eval_loss": r.eval_loss,
            "trained": r.trained,
            "changes": r.changes,
            "active": len(r.rank_map.active()),
        }
        for r in evaluation.rounds
    ]
    return entry


def _newest(workdir: Path, pattern: str) -> Path:
    found = sorted((workdir / "artifacts").glob(f"*/*/*/{pattern}"), key=lambda p: p.stat().st_mtime)
    if not found:
        found = sorted((workdir / "artifacts").rglob(pattern), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("workdir", workdir, f"a finished run; {pattern} is not there")
    return found[-1].parent


def _replace_tree(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
