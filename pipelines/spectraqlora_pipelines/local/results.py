"""What a local run came to: summary, report, merged model and adapter in its work directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, FourBitModel, MergedModel, PreparedRows
from spectraqlora.files import link_or_copy, write_text

from spectraqlora_pipelines.local.outputs import RunOutputs


def collect(outputs: RunOutputs, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Bring a run's results to its work directory: `summary.json`, `merged/`, `adapter/` and `report.html`.

    Args:
        outputs: of the run; recorded as the latest of the work directory.
        more: what the summary says besides.

    Raises:
        InputError: the run did not finish.
    """
    workdir = outputs.workdir
    leaderboard, exported = outputs.path("compare", "leaderboard"), outputs.path("merge-export", "exported")
    board = json.loads((leaderboard / "leaderboard.json").read_text())
    evaluations = [Evaluation.read(leaderboard / method) for method in board["order"]]
    first, merged = evaluations[0], MergedModel.read(exported)
    model = FourBitModel.read(outputs.path("quantize-load", "four_bit"))
    rows = PreparedRows.read(outputs.path("prepare-data", "rows"))
    registered = json.loads((outputs.path("register", "registered") / "registered.json").read_text())
    decision = json.loads((outputs.path("promote", "decision") / "decision.json").read_text())
    outputs.write()
    for name in ("merged", "adapter"):
        _replace_tree(exported / name, workdir / name)
    summary: dict[str, Any] = {
        "version": __version__,
        "base": {
            "model": model.source,
            "digest": model.base_digest,
            "eval_loss": first.base_eval_loss,
            "perplexity": first.base_perplexity,
            "accuracy": first.base_accuracy,
            "parameters": model.parameters,
            "four_bit_share": model.four_bit_parameters / model.parameters,
        },
        "data": {
            "source": rows.source,
            "digest": rows.digest,
            "train_rows": rows.train_rows,
            "eval_rows": rows.eval_rows,
            "test_rows": rows.test_rows,
            "layout": rows.layout,
            **rows.account.model_dump(mode="json"),
        },
        "methods": {evaluation.method: _method_entry(evaluation) for evaluation in evaluations},
        "winner": board["winner"],
        "against_best": board["against_best"],
        "merged_model": str(workdir / "merged"),
        "adapter": str(workdir / "adapter"),
        "merged_into": merged.merged_into,
        "merged_eval_loss": merged.verified_eval_loss,
        "test": {
            "rows": merged.test_rows,
            "base_loss": merged.base_test_loss,
            "loss": merged.test_loss,
            "loss_stderr": merged.test_loss_stderr,
        },
        "merge_warning": merged.warning,
        "published": merged.published,
        "registered": registered,
        "promotion": decision,
    }
    summary |= more or {}
    write_text(workdir / "summary.json", json.dumps(summary, indent=1))
    report(outputs)
    return summary


def collect_retraining(outputs: RunOutputs) -> dict[str, Any]:
    """What a retraining came to: `summary.json` with what changed and, where something did, what came of it.

    Raises:
        InputError: the run did not finish.
    """
    changes = json.loads((outputs.path("detect-changes", "changes") / "changes.json").read_text())
    if changes["changed"]:
        return collect(outputs, {"changes": changes})
    summary = {"version": __version__, "changes": changes}
    write_text(outputs.workdir / "summary.json", json.dumps(summary, indent=1))
    return summary


def report(outputs: RunOutputs) -> Path:
    """Write `report.html`, the page that compare made."""
    page = outputs.workdir / "report.html"
    write_text(page, outputs.path("compare", "report").read_text(encoding="utf-8"))
    return page


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
            "changes": r.changes,
            "active": len(r.rank_map.active()),
        }
        for r in evaluation.rounds
    ]
    return entry


def _replace_tree(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
