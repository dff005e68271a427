"""The steps that every pipeline has, from quantize-load to promote, and the one that runs however they end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kfp import dsl
from spectraqlora.steps.close_runs.component import close_runs
from spectraqlora.steps.compare.component import compare
from spectraqlora.steps.measure_base.component import measure_base
from spectraqlora.steps.merge_export.component import merge_export
from spectraqlora.steps.prepare_data.component import prepare_data
from spectraqlora.steps.promote.component import promote as promote_step
from spectraqlora.steps.quantize_load.component import quantize_load
from spectraqlora.steps.register.component import register
from spectraqlora.steps.snr_analyze.component import snr_analyze

from spectraqlora_pipelines.dags.placement import Placement


@contextlib.contextmanager
def closing_runs(tracking: Any, place: Placement) -> Iterator[None]:
    """Around all steps of a pipeline: when they have ended, in whatever way, close-runs ends what they left open.

    A DAG for this machine goes without: a stopped run is resumed there by the same command, in the same MLflow runs,
    and kfp.local would start a process more for every run.
    """
    if place.local:
        yield
        return
    closed = close_runs(tracking_settings=tracking)
    place(closed, "close-runs")
    with dsl.ExitHandler(closed, name="all steps"):
        yield


def shared_steps(
    branches: dict[str, Any],
    given: dict[str, Any],
    origin: dict[str, Any],
    place: Placement,
    snr_source: str,
) -> None:
    """The steps of every pipeline, from quantize-load to promote.

    Args:
        branches: by method.
        given: the pipeline's parameters by name.
        origin: what the registered version says of where it comes from.
        place: names and places the tasks.
        snr_source: `original`, or `quantized`, where alone snr-analyze is given the 4-bit model.
    """
    seed, evaluate, tracking = (given[name] for name in ("seed", "evaluate", "tracking"))
    quantized = quantize_load(
        base_model=given["base_model"], content=given["base_content"], model_settings=given["model"]
    )
    place(quantized, "quantize-load")
    four_bit, outline = quantized.outputs["four_bit"], quantized.outputs["outline"]
    prepared = prepare_data(
        source=given["source"],
        content=given["source_content"],
        data_settings=given["data"],
        seed=seed,
        outline=outline,
    )
    place(prepared, "prepare-data")
    rows = prepared.outputs["rows"]
    weights = {"four_bit": four_bit} if snr_source == "quantized" else {}
    analyzed = snr_analyze(
        snr_settings=given["snr"], content=given["table_content"], outline=outline, **weights
    )
    place(analyzed, "snr-analyze")
    table = analyzed.outputs["table"]
    measured = measure_base(
        methods=",".join(branches),
        select_settings=given["select"],
        evaluate_settings=evaluate,
        seed=seed,
        four_bit=four_bit,
        rows=rows,
    )
    place(measured, "measure-base")
    results: dict[str, Any] = {}
    for method, branch in branches.items():
        outcome = branch(
            method=method,
            seed=seed,
            snr_settings=given["snr"],
            select_settings=given["select"],
            train_settings=given["train"],
            evaluate_settings=evaluate,
            tracking_settings=tracking,
            checkpoint_settings=given["checkpoint"],
            outline=outline,
            four_bit=four_bit,
            rows=rows,
            table=table,
            measurement=measured.outputs["measurement"],
        )
        outcome.set_display_name(f"branch: {method}")
        results[method] = outcome.outputs["evaluation"]
        results[f"{method}_adapter"] = outcome.outputs["adapter"]
    compared = compare(tracking_settings=tracking, outline=outline, rows=rows, table=table, **results)
    place(compared, "compare")
    winner = compared.outputs["winner"]
    exported = merge_export(
        evaluate_settings=evaluate,
        export_settings=given["export"],
        four_bit=four_bit,
        rows=rows,
        winner=winner,
    )
    place(exported, "merge-export")
    registered = register(
        tracking_settings=tracking,
        origin=origin,
        rows=rows,
        winner=winner,
        exported=exported.outputs["exported"],
        leaderboard=compared.outputs["leaderboard"],
    )
    place(registered, "register")
    promoted = promote_step(
        tracking_settings=tracking,
        promote_settings=given["promote"],
        evaluate_settings=evaluate,
        export_settings=given["export"],
        registered=registered.outputs["registered"],
    )
    place(promoted, "promote")
