"""The ablation DAG: one branch per method, rounds unrolled, then compare, merge-export and register."""

from pathlib import Path
from typing import Any, NamedTuple

from kfp import compiler, dsl
from spectraqlora.compare.component import compare
from spectraqlora.merge_export.component import merge_export
from spectraqlora.prepare_data.component import prepare_data
from spectraqlora.promote.component import promote as promote_step
from spectraqlora.quantize_load.component import quantize_load
from spectraqlora.re_evaluate.component import re_evaluate
from spectraqlora.register.component import register
from spectraqlora.select_layers.component import select_layers
from spectraqlora.settings import Settings
from spectraqlora.snr_analyze.component import snr_analyze
from spectraqlora.start_point.component import start_point
from spectraqlora.train.component import train

from spectraqlora_pipelines.placement import Placement

DEFAULTS = Settings().model_dump(mode="json")


class Branch(NamedTuple):
    evaluation: dsl.Metrics
    adapter: dsl.Model


def branch_of(name: str, rounds: int, place: Placement, from_champion: bool = False) -> Any:
    """The nested pipeline of one method: select-layers, then train and re-evaluate for every round.

    Args:
        name: the method.
        rounds: unrolled.
        place: names and places the tasks.
        from_champion: whether the first round starts from the champion's adapter where it fits.
    """

    @dsl.pipeline(name=f"branch-{name}", description=f"select-layers, train and re-evaluate for {name}")
    def branch(
        method: str,
        run_key: str,
        seed: int,
        snr: dict,
        select: dict,
        train_settings: dict,
        evaluate: dict,
        tracking: dict,
        checkpoint: dict,
        quantized: dsl.Input[dsl.Model],
        data: dsl.Input[dsl.Dataset],
        table: dsl.Input[dsl.Dataset],
    ) -> Branch:
        chosen = select_layers(
            method=method, settings=select, seed=seed, quantized=quantized, data=data, table=table
        )
        place(chosen, f"select-layers ({name})")
        ranks: Any = chosen.outputs["ranks"]
        carried: dict[str, Any] = {}
        if from_champion:
            begun = start_point(tracking=tracking, ranks=ranks)
            place(begun, f"start-point ({name})")
            ranks, carried = begun.outputs["start_ranks"], {"start": begun.outputs["start_adapter"]}
        judged: Any = None
        for number in range(1, rounds + 1):
            trained = train(
                run_key=run_key,
                round=number,
                rounds=rounds,
                settings=train_settings,
                evaluate=evaluate,
                tracking=tracking,
                checkpoint=checkpoint,
                seed=seed,
                quantized=quantized,
                data=data,
                ranks=ranks,
                **carried,
            )
            place(trained, f"train ({name}, round {number})")
            before = {"previous": judged.outputs["evaluation"]} if judged else {}
            judged = re_evaluate(
                run_key=run_key,
                settings=evaluate,
                select=select,
                snr=snr,
                tracking=tracking,
                seed=seed,
                quantized=quantized,
                data=data,
                ranks=ranks,
                adapter=trained.outputs["adapter"],
                **before,
            )
            place(judged, f"re-evaluate ({name}, round {number})")
            ranks, carried = judged.outputs["next_ranks"], {"previous": judged.outputs["next_adapter"]}
        return Branch(evaluation=judged.outputs["evaluation"], adapter=trained.outputs["adapter"])

    return branch


def ablation_pipeline(methods: tuple[str, ...], rounds: int, place: Placement = Placement()) -> Any:
    """The pipeline with a static branch for each method and its rounds unrolled, its tasks placed by `place`."""
    branches = {method: branch_of(method, rounds, place) for method in methods}

    @dsl.pipeline(
        name="spectraqlora-ablation",
        description="QLoRA and Spectrum ablations, from base to registry",
        pipeline_config=place.pipeline_config(),
    )
    def ablation(
        base_model: str = DEFAULTS["model"]["base_model"],
        base_content: str = "",
        source: str = DEFAULTS["data"]["source"],
        source_content: str = "",
        table_content: str = "",
        run_key: str = dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        seed: int = DEFAULTS["seed"],
        model: dict = DEFAULTS["model"],
        data: dict = DEFAULTS["data"],
        snr: dict = DEFAULTS["snr"],
        select: dict = DEFAULTS["select"],
        train: dict = DEFAULTS["train"],
        evaluate: dict = DEFAULTS["evaluate"],
        tracking: dict = DEFAULTS["tracking"],
        promote: dict = DEFAULTS["promote"],
        checkpoint: dict = DEFAULTS["checkpoint"],
        export: dict = DEFAULTS["export"],
    ):
        whole_course(branches, dict(locals()), {}, place)

    return ablation


def whole_course(
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


def write_yaml(pipeline: Any, path: Path) -> None:
    """Write a pipeline's YAML, the same text every time.

    The compiler's leading comments list dict defaults in random order; they go, the IR says the same.
    """
    compiler.Compiler().compile(pipeline, str(path))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")
