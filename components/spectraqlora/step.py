"""What each component's thin body calls: KFP artifacts in, one typed function, KFP artifacts out.

An `InputError` ends a step with its one line and exit code 2; every other error keeps its traceback.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from spectraqlora import __version__
from spectraqlora.artifacts import (
    Evaluation,
    MergedModel,
    PreparedData,
    RankMap,
    TrainingLog,
    folder_digest,
    write_text,
)
from spectraqlora.errors import InputError, Stopped
from spectraqlora.quiet import hush
from spectraqlora.settings import (
    CheckpointSettings,
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    PromoteSettings,
    SelectSettings,
    SnrSettings,
    TrackingSettings,
    TrainSettings,
)

P = ParamSpec("P")
R = TypeVar("R")
ERROR_PREFIX = "error: "
LAUNCHER_PID = "SPECTRAQLORA_LAUNCHER_PID"
"""Environment variable that names the local process without which a step has nobody to work for."""


def _end_with_launcher() -> None:
    """End this process soon after the launcher's end, however that came."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        return

    def watch() -> None:
        while os.path.exists(f"/proc/{launcher}"):
            time.sleep(1)
        os._exit(1)

    if os.path.exists("/proc"):
        threading.Thread(target=watch, daemon=True).start()


def _step(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        hush()
        _end_with_launcher()
        try:
            return function(*args, **kwargs)
        except InputError as error:
            print(f"{ERROR_PREFIX}{error}", flush=True)
            sys.exit(2)
        except Stopped as stop:
            print(stop, flush=True)
            sys.exit(stop.exit_code)
        except OSError as error:
            if error.errno != 28:
                raise
            print(f"{ERROR_PREFIX}{InputError('disk', error.filename or 'output', 'free space; it is full')}")
            sys.exit(2)

    return guarded


def _folder(artifact: Any) -> Path:
    """The artifact's folder, made empty: a retry never sees what a failed attempt left behind."""
    folder = Path(artifact.path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@_step
def run_prepare_data(
    source: str, content: str, settings: dict[str, Any], seed: int, tokenizer: Any, data: Any
) -> None:
    from spectraqlora.prepare_data.prepare import prepare

    section = DataSettings(**{**settings, "source": source})
    result = prepare(section, Path(tokenizer.path), seed, _folder(data), content)
    data.metadata.update(digest=result.digest, train_rows=result.train_rows, eval_rows=result.eval_rows)


@_step
def run_quantize_load(base_model: str, content: str, settings: dict[str, Any], quantized: Any) -> None:
    from spectraqlora.quantize_load.quantize import quantize

    section = ModelSettings(**{**settings, "base_model": base_model})
    result = quantize(section, _folder(quantized), content)
    quantized.metadata.update(
        digest=result.base_digest, four_bit_share=result.four_bit_parameters / result.parameters
    )


@_step
def run_snr_analyze(settings: dict[str, Any], quantized: Any, table: Any) -> None:
    from spectraqlora.snr_analyze.analyze import analyze

    analyze(SnrSettings(**settings), Path(quantized.path), _folder(table))


@_step
def run_select_layers(
    method: str, settings: dict[str, Any], seed: int, quantized: Any, data: Any, table: Any, ranks: Any
) -> None:
    from spectraqlora.select_layers.select import select

    section = SelectSettings(**settings)
    result = select(
        method, Path(quantized.path), Path(data.path), Path(table.path), section, seed, _folder(ranks)
    )
    ranks.metadata.update(method=method, active=len(result.active()))


@_step
def run_train(
    run_key: str,
    rounds: int,
    settings: dict[str, Any],
    evaluate: dict[str, Any],
    tracking: dict[str, Any],
    seed: int,
    quantized: Any,
    data: Any,
    ranks: Any,
    adapter: Any,
    previous: Any,
    checkpoint: dict[str, Any],
    start: Any = None,
) -> None:
    arguments = dict(locals())
    from spectraqlora.live_metrics import LiveMetrics
    from spectraqlora.tracking import Tracker
    from spectraqlora.train import distributed
    from spectraqlora.train.training import check_optimizer, nothing_left, train

    # KFP hands every number over as a float; the sections give them their types back.
    section, scoring = TrainSettings(**settings), EvaluateSettings(**evaluate)
    rank_map = RankMap.read(ranks.path)
    check_optimizer(section)
    count = distributed.processes(section)
    distributed.share(section, count)
    begin = start.path if start is not None and any(Path(start.path).iterdir()) else None
    if count > 1 and not distributed.launched() and not nothing_left(rank_map):
        distributed.launch(count, arguments)
        return
    work = functools.partial(
        train,
        Path(quantized.path),
        Path(data.path),
        Path(ranks.path),
        section,
        scoring,
        seed,
        rounds,
        previous=Path(previous.path) if previous is not None else None,
        start=Path(begin) if begin is not None else None,
        checkpoint=CheckpointSettings(**checkpoint),
    )
    if not distributed.is_main():
        work(output=Path(adapter.path))
        return
    tracker = Tracker(TrackingSettings(**tracking), run_key, "train")
    branch = tracker.branch_run(rank_map.method)
    tracker.log_params(
        branch,
        {
            "method": rank_map.method,
            "seed": seed,
            "train": section.model_dump(),
            "evaluate": scoring.model_dump(),
        },
    )
    tracker.log_data(branch, PreparedData.read(data.path))
    with LiveMetrics(tracker, branch, (rank_map.round - 1) * section.max_steps) as live:
        log: TrainingLog = work(output=_folder(adapter), on_metric=live)

    def send() -> None:
        tracker.log_training(branch, log, section.max_steps)
        tracker.log_file(branch, Path(ranks.path) / RankMap.filename(), f"round-{log.round}")

    tracker.patiently(send, "what training logged")


@_step
def run_re_evaluate(
    run_key: str,
    sections: tuple[dict[str, Any], ...],
    seed: int,
    inputs: tuple[Any, ...],
    outputs: tuple[Any, Any, Any],
) -> None:
    from spectraqlora.re_evaluate.evaluate import re_evaluate
    from spectraqlora.tracking import Tracker

    settings, select, snr, tracking = sections
    quantized, data, ranks, adapter, previous = inputs
    evaluation = outputs[0]
    tracker = Tracker(TrackingSettings(**tracking), run_key, "re-evaluate")
    branch = tracker.branch_run(RankMap.read(ranks.path).method)
    folders = [_folder(artifact) for artifact in outputs]
    result = re_evaluate(
        Path(quantized.path),
        Path(data.path),
        Path(ranks.path),
        Path(adapter.path),
        EvaluateSettings(**settings),
        SelectSettings(**select),
        SnrSettings(**snr),
        seed,
        folders[0],
        folders[1],
        folders[2],
        previous=Path(previous.path) if previous is not None else None,
    )
    metrics = headline(result)
    for name, value in metrics.items():
        evaluation.log_metric(name, value)
    chosen = {"select": SelectSettings(**select).model_dump(), "snr": SnrSettings(**snr).model_dump()}

    def send() -> None:
        tracker.log_params(branch, chosen)
        tracker.log_evaluation(branch, result, metrics)
        tracker.log_folder(branch, folders[0], "evaluation")
        tracker.finish(branch)

    tracker.patiently(send, "the evaluation")


def headline(result: Evaluation) -> dict[str, float]:
    """The numbers of an evaluation that a table of runs shows."""
    values = {
        "eval_loss": result.eval_loss,
        "base_eval_loss": result.base_eval_loss,
        "perplexity": result.perplexity,
        "accuracy": result.accuracy,
        "base_accuracy": result.base_accuracy,
        "trainable_parameters": float(result.trainable_parameters),
        "train_seconds": result.train_seconds,
        "train_tokens_per_second": result.train_tokens_per_second,
        "peak_memory_bytes": float(result.peak_memory_bytes),
    }
    return {name: value for name, value in values.items() if value is not None}


@_step
def run_compare(
    run_key: str,
    tracking: dict[str, Any],
    table: Any,
    evaluations: list[Any],
    adapters: list[Any],
    leaderboard: Any,
    winner: Any,
) -> None:
    from spectraqlora.compare.leaderboard import rank
    from spectraqlora.compare.leaderboard import winner as choose
    from spectraqlora.compare.plots import write_plots
    from spectraqlora.snr.table import read_table
    from spectraqlora.tracking import Tracker

    tracker = Tracker(TrackingSettings(**tracking), run_key, "compare")
    run = tracker.pipeline_run()

    found = {
        (e := Evaluation.read(evaluation.path)).method: (e, adapter)
        for evaluation, adapter in zip(evaluations, adapters, strict=True)
        if evaluation is not None
    }
    ordered = rank([evaluation for evaluation, _ in found.values()])
    best = choose(ordered)
    board, chosen = _folder(leaderboard), _folder(winner)
    write_text(
        board / "leaderboard.json",
        json.dumps({"winner": best, "order": [e.method for e in ordered]}, indent=1),
    )
    for entry in ordered:
        leaderboard.log_metric(f"{entry.method}_eval_loss", entry.eval_loss)
        entry.write(board / entry.method)
    shutil.copytree(found[best][1].path, chosen / "adapter")
    found[best][0].write(chosen)
    winner.metadata["method"] = best

    def send() -> None:
        # What an earlier step could not send while the server was away goes with it.
        for entry in ordered:
            branch = tracker.branch_run(entry.method)
            tracker.log_evaluation(branch, entry, headline(entry))
            tracker.finish(branch)
        tracker.log_metrics(run, {f"{e.method}_eval_loss": e.eval_loss for e in ordered})
        tracker.set_tags(run, {"winner": best})
        tracker.log_file(run, board / "leaderboard.json")
        tracker.log_folder(run, board / "plots", "plots")
        for name in ("snr.parquet", "heatmap.png"):
            tracker.log_file(run, Path(table.path) / name, "snr")

    write_plots(ordered, read_table(Path(table.path)), best, board / "plots")
    tracker.patiently(send, "the leaderboard")


@_step
def run_merge_export(
    settings: dict[str, Any], export: dict[str, Any], quantized: Any, data: Any, winner: Any, exported: Any
) -> None:
    from spectraqlora.merge_export.merge import merge_export

    chosen = Path(winner.path)
    result = merge_export(
        Path(quantized.path),
        Path(data.path),
        chosen / "adapter",
        Evaluation.read(chosen),
        EvaluateSettings(**settings),
        _folder(exported),
        ExportSettings(**export),
    )
    exported.metadata.update(method=result.method, merged_into=result.merged_into, **result.published)


@_step
def run_register(
    run_key: str,
    tracking: dict[str, Any],
    origin: dict[str, str],
    data: Any,
    winner: Any,
    exported: Any,
    registered: Any,
) -> None:
    from spectraqlora.register.registry import register
    from spectraqlora.tracking import REVISION, Tracker

    section = TrackingSettings(**tracking)
    tracker = Tracker(section, run_key, "register")
    run = tracker.pipeline_run()
    evaluation, merged = Evaluation.read(winner.path), MergedModel.read(exported.path)
    tags = {
        "method": evaluation.method,
        "base_digest": evaluation.base_digest,
        "data_digest": evaluation.data_digest,
        "merged_digest": folder_digest(Path(exported.path) / "merged"),
        "merged_into": merged.merged_into,
        "spectraqlora_version": __version__,
        "run_key": run_key,
        **{name: value for name, value in origin.items() if value},
    }
    if os.environ.get(REVISION):
        tags["source_revision"] = os.environ[REVISION]
    loss = merged.verified_eval_loss if section.registered_form == "merged" else merged.eval_loss_original
    name, version = register(
        tracker,
        Path(exported.path),
        Path(winner.path),
        Path(data.path),
        tags,
        {**headline(evaluation), "merged_eval_loss": loss},
    )
    tracker.log_data(run, PreparedData.read(data.path))
    write_text(_folder(registered) / "registered.json", json.dumps({"name": name, "version": version}))
    registered.metadata.update(name=name, version=version)
    tracker.finish(run)


@_step
def run_promote(
    tracking: dict[str, Any],
    settings: dict[str, Any],
    evaluate: dict[str, Any],
    registered: Any,
    decision: Any,
) -> None:
    from spectraqlora.promote.promotion import Promotion
    from spectraqlora.registry import CHAMPION, Registry

    section = PromoteSettings(**settings)
    found = json.loads((Path(registered.path) / "registered.json").read_text())
    registry = Registry(TrackingSettings(**{**tracking, "registered_model": found["name"]}))
    promotion = Promotion(registry, registry.version(found["version"]), section, EvaluateSettings(**evaluate))
    # A gate that is off still says what it would have said.
    outcome = promotion.run(dry_run=not section.enabled)
    print(f"version {outcome.version}: {outcome.decision}: {outcome.reason}", flush=True)
    for name, value in (
        *outcome.challenger.items(),
        *((f"champion_{k}", v) for k, v in outcome.champion.items()),
    ):
        decision.log_metric(name, value)
    champion = registry.by_alias(CHAMPION)
    document = {**asdict(outcome), "enabled": section.enabled, "now": champion.number if champion else None}
    write_text(_folder(decision) / "decision.json", json.dumps(document, indent=1))


@_step
def run_detect_changes(
    source: str, settings: dict[str, Any], tracking: dict[str, Any], recipe: str, changes: Any
) -> str:
    from spectraqlora.detect_changes.changes import UNCHANGED, compare, source_digest
    from spectraqlora.registry import Registry

    registry = Registry(TrackingSettings(**tracking))
    digest = source_digest(DataSettings(**{**settings, "source": source}))
    found = compare(digest, recipe, registry.versions())
    print(f"{'training' if found.changed else 'stopping early'}: {found.reason}", flush=True)
    write_text(_folder(changes) / "changes.json", json.dumps(asdict(found), indent=1))
    return found.digest if found.changed else UNCHANGED


@_step
def run_start_point(tracking: dict[str, Any], ranks: Any, start_ranks: Any, start_adapter: Any) -> None:
    from spectraqlora.registry import Registry
    from spectraqlora.start_point.champion import start_from

    registry = Registry(TrackingSettings(**tracking))
    with tempfile.TemporaryDirectory() as scratch:
        found = registry.champion_adapter(Path(scratch))
        champion = (found[0].number, found[1]) if found else None
        said = start_from(champion, Path(ranks.path), _folder(start_ranks), _folder(start_adapter))
    print(f"training starts {said}", flush=True)
