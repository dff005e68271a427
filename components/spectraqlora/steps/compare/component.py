"""The KFP component of compare."""

from typing import Optional

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def compare(
    tracking_settings: dict,
    outline: dsl.Input[dsl.Artifact],
    rows: dsl.Input[dsl.Dataset],
    table: dsl.Input[dsl.Dataset],
    leaderboard: dsl.Output[dsl.Metrics],
    winner: dsl.Output[dsl.Model],
    report: dsl.Output[dsl.HTML],
    qlora: Optional[dsl.Input[dsl.Metrics]] = None,  # noqa: UP045 - the KFP compiler reads this form
    hybrid: Optional[dsl.Input[dsl.Metrics]] = None,  # noqa: UP045
    alors: Optional[dsl.Input[dsl.Metrics]] = None,  # noqa: UP045
    sgm: Optional[dsl.Input[dsl.Metrics]] = None,  # noqa: UP045
    qlora_half: Optional[dsl.Input[dsl.Metrics]] = None,  # noqa: UP045
    random: Optional[dsl.Input[dsl.Metrics]] = None,  # noqa: UP045
    qlora_adapter: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045
    hybrid_adapter: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045
    alors_adapter: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045
    sgm_adapter: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045
    qlora_half_adapter: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045
    random_adapter: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045
):
    """Order the branches by their loss on the same held-out rows and pass the winner's adapter on.

    Args:
        tracking_settings: the `tracking` section.
        outline: of the base model, for the report.
        rows: prepared rows, for the report.
        table: SNR table before training.
        leaderboard: all evaluations in order, best first.
        winner: the winner's adapter and evaluation.
        report: the page with leaderboard, data, curves, SNR and where each method trained.
        qlora: evaluation of the branch; absent where it was not run.
        hybrid: as above.
        alors: as above.
        sgm: as above.
        qlora_half: as above.
        random: as above.
        qlora_adapter: adapter of the branch.
        hybrid_adapter: as above.
        alors_adapter: as above.
        sgm_adapter: as above.
        qlora_half_adapter: as above.
        random_adapter: as above.
    """
    from spectraqlora.steps.compare.step import run

    run(
        tracking_settings=tracking_settings,
        outline=outline,
        rows=rows,
        table=table,
        branches={
            "qlora": (qlora, qlora_adapter),
            "hybrid": (hybrid, hybrid_adapter),
            "alors": (alors, alors_adapter),
            "sgm": (sgm, sgm_adapter),
            "qlora_half": (qlora_half, qlora_half_adapter),
            "random": (random, random_adapter),
        },
        leaderboard=leaderboard,
        winner=winner,
        report=report,
    )
