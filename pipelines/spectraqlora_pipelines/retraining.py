"""The retraining DAG: stop early where nothing changed, else one method, evaluation, and the gate."""

from typing import Any

from kfp import dsl
from spectraqlora.detect_changes.changes import RECIPE_DIGEST, SOURCE_DIGEST, UNCHANGED
from spectraqlora.detect_changes.component import detect_changes

from spectraqlora_pipelines.ablation import DEFAULTS, branch_of, compare_and_register, first_steps
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
            inputs = first_steps(
                base_model,
                base_content,
                source,
                digest,
                table_content,
                seed,
                {"model": model, "data": data, "snr": snr},
                place,
            )
            compare_and_register(
                {method: branch},
                inputs,
                run_key,
                seed,
                {
                    "snr": snr,
                    "select": select,
                    "train": train,
                    "evaluate": evaluate,
                    "tracking": tracking,
                    "promote": promote,
                    "checkpoint": checkpoint,
                    "export": export,
                },
                {SOURCE_DIGEST: digest, RECIPE_DIGEST: recipe},
                place,
            )

    return retraining
