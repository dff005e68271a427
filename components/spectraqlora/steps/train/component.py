"""The KFP component of train."""

from typing import Optional

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="train")
def train(
    run_key: str,
    round: int,
    rounds: int,
    settings: dict,
    evaluate: dict,
    tracking: dict,
    seed: int,
    quantized: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    ranks: dsl.Input[dsl.Artifact],
    adapter: dsl.Output[dsl.Model],
    previous: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045 - the KFP compiler reads this form
    start: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045
    checkpoint: dict = {},  # noqa: B006 - KFP's form of a default
):
    """Train the rank map's adapters on the frozen 4-bit model.

    Args:
        run_key: identifies the pipeline run in MLflow.
        round: this round, from 1.
        rounds: all rounds of the branch.
        settings: the `train` section.
        evaluate: the `evaluate` section.
        tracking: the `tracking` section.
        seed: of data order and fresh adapters.
        quantized: 4-bit model artifact.
        data: prepared data.
        ranks: rank map.
        adapter: PEFT adapter with training log.
        previous: adapter carried over from the round before.
        start: adapter to start the first round from; an empty one is none.
        checkpoint: the `checkpoint` section.
    """
    from spectraqlora.steps.train.step import run

    run(
        run_key,
        rounds,
        settings,
        evaluate,
        tracking,
        seed,
        quantized,
        data,
        ranks,
        adapter,
        previous,
        checkpoint,
        start,
    )
