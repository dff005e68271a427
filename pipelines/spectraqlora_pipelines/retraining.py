"""The retraining DAG: stop early where nothing changed, else one method, evaluation, and the gate."""

from typing import Any

from kfp import dsl
from spectraqlora.compare.component import compare
from spectraqlora.detect_changes.changes import RECIPE_DIGEST, SOURCE_DIGEST, UNCHANGED
from spectraqlora.detect_changes.component import detect_changes
from spectraqlora.prepare_data.component import prepare_data
from spectraqlora.quantize_load.component import quantize_load
from spectraqlora.snr_analyze.component import snr_analyze

from spectraqlora_pipelines.ablation import DEFAULTS, branch_of, hand_over
from spectraqlora_pipelines.placement import Placement


def retraining_pipeline(method: str, rounds: int, start: str, place: Placement = Placement()) -> Any:
    """The pipeline for one method.

    Args:
        method: the branch to run.
        rounds: unrolled.
        start: `base`, or `champion` to start from its adapter where it fits.
        place: names and places the tasks.
    """
    branch = branch_of(method, rounds, place, from_champion=start == "champion")

    @dsl.pipeline(
        name="spectraqlora-retraining",
        description="Retrain when data or settings changed; the champion stays unless the gate lets another one in",
        pipeline_config=place.pipeline_config(),
    )
    def retraining(
        base_model: str = DEFAULTS["model"]["base_model"],
        base_content: str = "",
        source: str = DEFAULTS["data"]["source"],
        table_content: str = "",
        recipe: str = "",
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
        looked = detect_changes(source=source, settings=data, tracking=tracking, recipe=recipe)
        place(looked, "detect-changes")
        digest = looked.outputs["Output"]
        with dsl.If(looked.outputs["Output"] != UNCHANGED, name="something-changed"):
            quantized = quantize_load(base_model=base_model, content=base_content, settings=model)
            place(quantized, "quantize-load")
            four_bit = quantized.outputs["quantized"]
            prepared = prepare_data(
                source=source, content=digest, settings=data, seed=seed, tokenizer=four_bit
            )
            place(prepared, "prepare-data")
            measured = snr_analyze(settings=snr, content=table_content, quantized=four_bit)
            place(measured, "snr-analyze")
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
            compared = compare(
                run_key=run_key,
                tracking=tracking,
                table=measured.outputs["table"],
                **{method: outcome.outputs["evaluation"], f"{method}_adapter": outcome.outputs["adapter"]},
            )
            place(compared, "compare")
            hand_over(
                run_key=run_key,
                evaluate=evaluate,
                tracking=tracking,
                promote=promote,
                export=export,
                origin={SOURCE_DIGEST: digest, RECIPE_DIGEST: recipe},
                four_bit=four_bit,
                prepared=prepared,
                winner=compared.outputs["winner"],
                place=place,
            )

    return retraining
