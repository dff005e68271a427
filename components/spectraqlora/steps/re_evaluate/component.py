"""The KFP component of re-evaluate."""

from typing import Optional

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="re-evaluate")
def re_evaluate(
    run_key: str,
    settings: dict,
    select: dict,
    snr: dict,
    tracking: dict,
    seed: int,
    quantized: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    ranks: dsl.Input[dsl.Artifact],
    adapter: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Metrics],
    next_ranks: dsl.Output[dsl.Artifact],
    next_adapter: dsl.Output[dsl.Model],
    previous: Optional[dsl.Input[dsl.Metrics]] = None,  # noqa: UP045 - the KFP compiler reads this form
):
    """Score base and adapter on the same rows, measure the updated weights, decide the next round.

    Args:
        run_key: identifies the pipeline run in MLflow.
        settings: the `evaluate` section.
        select: the `select` section.
        snr: the `snr` section.
        tracking: the `tracking` section.
        seed: of fresh rows in grown adapters.
        quantized: 4-bit model artifact.
        data: prepared data.
        ranks: this round's rank map.
        adapter: this round's adapter.
        evaluation: metrics, rounds so far, SNR table of the updated weights.
        next_ranks: the next round's rank map.
        next_adapter: the adapter carried over to the next round's ranks.
        previous: the evaluation of the round before.
    """
    from spectraqlora.steps.re_evaluate.step import run

    run(
        run_key,
        (settings, select, snr, tracking),
        seed,
        (quantized, data, ranks, adapter, previous),
        (evaluation, next_ranks, next_adapter),
    )
