"""The KFP component of train."""

from typing import Optional

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="train")
def train(
    round: int,
    rounds: int,
    train_settings: dict,
    evaluate_settings: dict,
    tracking_settings: dict,
    seed: int,
    four_bit: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    rank_map: dsl.Input[dsl.Artifact],
    adapter: dsl.Output[dsl.Model],
    previous: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045 - the KFP compiler reads this form
    start: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045
    checkpoint_settings: dict = {},  # noqa: B006 - KFP's form of a default
):
    """Train the rank map's adapters on the frozen 4-bit model.

    Args:
        round: this round, from 1.
        rounds: all rounds of the branch.
        train_settings: the `train` section.
        evaluate_settings: the `evaluate` section.
        tracking_settings: the `tracking` section.
        seed: of data order and fresh adapters.
        four_bit: the 4-bit model.
        rows: prepared rows.
        rank_map: which modules get an adapter, of which rank.
        adapter: PEFT adapter with training log.
        previous: adapter carried over from the round before.
        start: adapter to start the first round from; an empty one is none.
        checkpoint_settings: the `checkpoint` section.
    """
    from spectraqlora.steps.train.step import run

    run(
        rounds=rounds,
        train_settings=train_settings,
        evaluate_settings=evaluate_settings,
        tracking_settings=tracking_settings,
        checkpoint_settings=checkpoint_settings,
        seed=seed,
        four_bit=four_bit,
        rows=rows,
        rank_map=rank_map,
        adapter=adapter,
        previous=previous,
        start=start,
    )
