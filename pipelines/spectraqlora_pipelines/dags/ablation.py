"""The ablation DAG: one branch per method, rounds unrolled, then compare, merge-export and register."""

from typing import Any

from kfp import dsl
from spectraqlora.settings import Settings

from spectraqlora_pipelines.dags.branch import branch_of, unrolled
from spectraqlora_pipelines.dags.placement import Placement
from spectraqlora_pipelines.dags.shared_steps import closing_runs, shared_steps

DEFAULTS = Settings().model_dump(mode="json")


def ablation_pipeline(
    methods: tuple[str, ...], rounds: int, place: Placement = Placement(), snr_source: str = "original"
) -> Any:
    """The pipeline with a static branch for each method and its rounds unrolled, its tasks placed by `place`.

    `snr_source` is `original`, or `quantized`, where the SNR of the 4-bit weights can be measured.
    """
    # Longest first: KFP renames what a nested pipeline brings (train, train-2) in the order of a hash table, and with
    # a shorter branch before a longer one that order shows in the names, so that no two compilations are the same
    # and nothing is found in a local run's cache.
    in_order = sorted(methods, key=lambda method: -unrolled(method, rounds))
    branches = {method: branch_of(method, rounds, place) for method in in_order}

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
            shared_steps(branches, given, {}, place, snr_source)

    return ablation
