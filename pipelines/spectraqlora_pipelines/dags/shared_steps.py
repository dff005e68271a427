"""The steps that every pipeline has, from quantize-load to promote."""

from __future__ import annotations

from typing import Any

from spectraqlora.steps.compare.component import compare
from spectraqlora.steps.merge_export.component import merge_export
from spectraqlora.steps.prepare_data.component import prepare_data
from spectraqlora.steps.promote.component import promote as promote_step
from spectraqlora.steps.quantize_load.component import quantize_load
from spectraqlora.steps.register.component import register
from spectraqlora.steps.snr_analyze.component import snr_analyze

from spectraqlora_pipelines.dags.placement import Placement


def shared_steps(
    branches: dict[str, Any], given: dict[str, Any], origin: dict[str, Any], place: Placement
) -> None:
    """The steps of every pipeline, from quantize-load to promote.

    Args:
        branches: by method.
        given: the pipeline's parameters by name.
        origin: what the registered version says of where it comes from.
        place: names and places the tasks.
    """
    run_key, seed, evaluate, tracking = (given[name] for name in ("run_key", "seed", "evaluate", "tracking"))
    quantized = quantize_load(
        base_model=given["base_model"], content=given["base_content"], settings=given["model"]
    )
    place(quantized, "quantize-load")
    four_bit = quantized.outputs["quantized"]
    prepared = prepare_data(
        source=given["source"],
        content=given["source_content"],
        settings=given["data"],
        seed=seed,
        tokenizer=four_bit,
    )
    place(prepared, "prepare-data")
    rows = prepared.outputs["data"]
    measured = snr_analyze(settings=given["snr"], content=given["table_content"], quantized=four_bit)
    place(measured, "snr-analyze")
    table = measured.outputs["table"]
    results: dict[str, Any] = {}
    for method, branch in branches.items():
        outcome = branch(
            method=method,
            run_key=run_key,
            seed=seed,
            snr=given["snr"],
            select=given["select"],
            train_settings=given["train"],
            evaluate=evaluate,
            tracking=tracking,
            checkpoint=given["checkpoint"],
            quantized=four_bit,
            data=rows,
            table=table,
        )
        outcome.set_display_name(f"branch: {method}")
        results[method] = outcome.outputs["evaluation"]
        results[f"{method}_adapter"] = outcome.outputs["adapter"]
    compared = compare(run_key=run_key, tracking=tracking, table=table, **results)
    place(compared, "compare")
    winner = compared.outputs["winner"]
    exported = merge_export(
        settings=evaluate,
        export=given["export"],
        quantized=four_bit,
        data=rows,
        winner=winner,
    )
    place(exported, "merge-export")
    registered = register(
        run_key=run_key,
        tracking=tracking,
        origin=origin,
        data=rows,
        winner=winner,
        exported=exported.outputs["exported"],
    )
    place(registered, "register")
    promoted = promote_step(
        tracking=tracking,
        settings=given["promote"],
        evaluate=evaluate,
        registered=registered.outputs["registered"],
    )
    place(promoted, "promote")
