"""The KFP component of register."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="re-evaluate")
def register(
    tracking_settings: dict,
    origin: dict,
    rows: dsl.Input[dsl.Dataset],
    winner: dsl.Input[dsl.Model],
    exported: dsl.Input[dsl.Model],
    leaderboard: dsl.Input[dsl.Metrics],
    registered: dsl.Output[dsl.Artifact],
):
    """Register the merged model, or base and adapter, in MLflow as `challenger`.

    Args:
        tracking_settings: the `tracking` section.
        origin: digests of data source and recipe, by which retraining knows what was trained already.
        rows: prepared rows, of which the held-out and test rows are kept next to the model.
        winner: the winner's adapter and evaluation.
        exported: the merged model.
        leaderboard: of compare; what steps that were taken from the cache did not send to MLflow is sent from it.
        registered: model name and version.
    """
    from spectraqlora.steps.register.step import run

    run(
        tracking_settings=tracking_settings,
        origin=origin,
        rows=rows,
        winner=winner,
        exported=exported,
        leaderboard=leaderboard,
        registered=registered,
    )
