"""The retraining DAG: stop early where nothing changed, else one method, evaluation, and the gate."""

from typing import Any

from kfp import dsl
from spectraqlora.steps.detect_changes.changes import RECIPE_DIGEST, SOURCE_DIGEST, UNCHANGED
from spectraqlora.steps.detect_changes.component import detect_changes

from spectraqlora_pipelines.dags.ablation import DEFAULTS
from spectraqlora_pipelines.dags.branch import branch_of
from spectraqlora_pipelines.dags.placement import Placement
from spectraqlora_pipelines.dags.shared_steps import closing_runs, shared_steps


def retraining_pipeline(
    method: str, rounds: int, start: str, place: Placement = Placement(), snr_source: str = "original"
) -> Any:
    """The pipeline for one method.

    Args:
        method: the branch to run.
        rounds: unrolled.
        start: `base`, or `champion` to start from its adapter where it fits.
        place: names and places the tasks.
        snr_source: `original`, or `quantized`, where the SNR of the 4-bit weights can be measured.
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
        given = dict(locals())
        with closing_runs(tracking, place):
            changes = detect_changes(
                source=source,
                base_model=base_model,
                base_content=base_content,
                table_content=table_content,
                data_settings=data,
                model_settings=model,
                snr_settings=snr,
                tracking_settings=tracking,
                recipe=recipe,
            )
            place(changes, "detect-changes")
            digest = changes.outputs["Output"]
            contents = {
                "source_content": digest,
                "base_content": changes.outputs["base_digest"],
                "table_content": changes.outputs["table_digest"],
            }
            with dsl.If(digest != UNCHANGED, name="something-changed"):
                origin = {SOURCE_DIGEST: digest, RECIPE_DIGEST: changes.outputs["full_recipe"]}
                shared_steps({method: branch}, {**given, **contents}, origin, place, snr_source)

    return retraining
