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

RETRIES = 2
DEFAULTS = Settings().model_dump(mode="json")


class Branch(NamedTuple):
    evaluation: dsl.Metrics
    adapter: dsl.Model


def named(task: Any, name: str, retries: int) -> Any:
    """Give a task its name on screen and its retries."""
    task.set_display_name(name)
    return task.set_retry(retries, backoff_duration="30s", backoff_factor=2.0) if retries else task


def branch_of(name: str, rounds: int, retries: int, from_champion: bool = False) -> Any:
    """The nested pipeline of one method: select-layers, then train and re-evaluate for every round.

    Args:
        name: the method.
        rounds: unrolled.
        retries: of every step.
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
        named(chosen, f"select-layers ({name})", retries)
        ranks: Any = chosen.outputs["ranks"]
        carried: dict[str, Any] = {}
        if from_champion:
            begun = start_point(tracking=tracking, ranks=ranks)
            named(begun, f"start-point ({name})", retries).set_caching_options(False)
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
            named(trained, f"train ({name}, round {number})", retries)
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
            named(judged, f"re-evaluate ({name}, round {number})", retries)
            ranks, carried = judged.outputs["next_ranks"], {"previous": judged.outputs["next_adapter"]}
        return Branch(evaluation=judged.outputs["evaluation"], adapter=trained.outputs["adapter"])

    return branch


def ablation_pipeline(methods: tuple[str, ...], rounds: int, retries: int = RETRIES) -> Any:
    """The pipeline with a static branch for each method and its rounds unrolled.

    On one machine a failed step fails again, so local runs ask for no retries; clusters lose pods.
    """
    branches = {method: branch_of(method, rounds, retries) for method in methods}

    @dsl.pipeline(
        name="spectraqlora-ablation", description="QLoRA and Spectrum ablations, from base to registry"
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
        quantized = quantize_load(base_model=base_model, content=base_content, settings=model)
        named(quantized, "quantize-load", retries)
        four_bit = quantized.outputs["quantized"]
        prepared = prepare_data(
            source=source, content=source_content, settings=data, seed=seed, tokenizer=four_bit
        )
        named(prepared, "prepare-data", retries)
        measured = snr_analyze(settings=snr, content=table_content, quantized=four_bit)
        named(measured, "snr-analyze", retries)
        results: dict[str, Any] = {}
        for method, branch in branches.items():
            outcome = branch(
                method=method,
                run_key=run_key,
                seed=seed,
                snr=snr,
                select=select,
                train_settings=train,
                evaluate=evaluate,
                tracking=tracking,
                checkpoint=checkpoint,
                quantized=four_bit,
                data=prepared.outputs["data"],
                table=measured.outputs["table"],
            )
            outcome.set_display_name(f"branch: {method}")
            results[method] = outcome.outputs["evaluation"]
            results[f"{method}_adapter"] = outcome.outputs["adapter"]
        compared = compare(run_key=run_key, tracking=tracking, table=measured.outputs["table"], **results)
        named(compared, "compare", retries)
        hand_over(
            run_key=run_key,
            evaluate=evaluate,
            tracking=tracking,
            promote=promote,
            export=export,
            origin={},
            four_bit=four_bit,
            prepared=prepared,
            winner=compared.outputs["winner"],
            retries=retries,
        )

    return ablation


def hand_over(
    run_key: Any,
    evaluate: Any,
    tracking: Any,
    promote: Any,
    export: Any,
    origin: Any,
    four_bit: Any,
    prepared: Any,
    winner: Any,
    retries: int,
) -> None:
    """The end of every pipeline: merge-export, register, promote."""
    data = prepared.outputs["data"]
    exported = merge_export(settings=evaluate, export=export, quantized=four_bit, data=data, winner=winner)
    named(exported, "merge-export", retries)
    registered = register(
        run_key=run_key,
        tracking=tracking,
        origin=origin,
        data=data,
        winner=winner,
        exported=exported.outputs["exported"],
    )
    named(registered, "register", retries).set_caching_options(False)
    promoted = promote_step(
        tracking=tracking,
        settings=promote,
        evaluate=evaluate,
        registered=registered.outputs["registered"],
    )
    named(promoted, "promote", retries).set_caching_options(False)


def write_yaml(pipeline: Any, path: Path) -> None:
    """Write a pipeline's YAML, the same text every time.

    The compiler's leading comments list dict defaults in random order; they go, the IR says the same.
    """
    compiler.Compiler().compile(pipeline, str(path))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")


def compile_pipeline(path: Path, methods: tuple[str, ...], rounds: int) -> None:
    """Write the pipeline YAML."""
    write_yaml(ablation_pipeline(methods, rounds), path)
