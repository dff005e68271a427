"""The KFP component of re-evaluate."""

from typing import Optional

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="re-evaluate")
def re_evaluate(
    round: int,
    rounds: int,
    evaluate_settings: dict,
    select_settings: dict,
    snr_settings: dict,
    tracking_settings: dict,
    seed: int,
    four_bit: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    rank_map: dsl.Input[dsl.Artifact],
    adapter: dsl.Input[dsl.Model],
    table: dsl.Input[dsl.Dataset],
    measurement: dsl.Input[dsl.Metrics],
    evaluation: dsl.Output[dsl.Metrics],
    next_rank_map: dsl.Output[dsl.Artifact],
    next_adapter: dsl.Output[dsl.Model],
    previous: Optional[dsl.Input[dsl.Metrics]] = None,  # noqa: UP045 - the KFP compiler reads this form
):
    """Score the adapter on the base's held-out rows, measure the weights it updated, prepare the next round.

    After a branch's last round, and for a method whose rank map never moves, no round follows: the last two outputs
    then hold only a file `none.txt` that says so.

    Args:
        round: this round, from 1.
        rounds: all rounds of the branch.
        evaluate_settings: the `evaluate` section.
        select_settings: the `select` section.
        snr_settings: the `snr` section.
        tracking_settings: the `tracking` section.
        seed: of calibration rows, and of fresh rows in grown adapters.
        four_bit: the 4-bit model.
        rows: prepared rows.
        rank_map: this round's rank map.
        adapter: this round's adapter.
        table: SNR table before training, for the matrices without an adapter.
        measurement: of the base, for its loss and accuracy.
        evaluation: metrics, rounds so far, SNR table of the updated weights.
        next_rank_map: the next round's rank map.
        next_adapter: the adapter carried over to the next round's ranks.
        previous: the evaluation of the round before.
    """
    from spectraqlora.steps.re_evaluate.step import run

    run(
        round=round,
        rounds=rounds,
        evaluate_settings=evaluate_settings,
        select_settings=select_settings,
        snr_settings=snr_settings,
        tracking_settings=tracking_settings,
        seed=seed,
        four_bit=four_bit,
        rows=rows,
        rank_map=rank_map,
        adapter=adapter,
        table=table,
        measurement=measurement,
        previous=previous,
        evaluation=evaluation,
        next_rank_map=next_rank_map,
        next_adapter=next_adapter,
    )
