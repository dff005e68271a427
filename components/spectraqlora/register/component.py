"""The KFP component of register."""

from kfp import dsl

from spectraqlora.step_images import image


@dsl.component(base_image=image("re-evaluate"), install_kfp_package=False)
def register(
    run_key: str,
    tracking: dict,
    winner: dsl.Input[dsl.Model],
    exported: dsl.Input[dsl.Model],
    registered: dsl.Output[dsl.Artifact],
):
    """Register the merged model in MLflow as `challenger`.

    Args:
        run_key: identifies the pipeline run in MLflow.
        tracking: the `tracking` section.
        winner: the winner's evaluation.
        exported: the merged model.
        registered: model name and version.
    """
    from spectraqlora.step import run_register

    run_register(run_key, tracking, winner, exported, registered)
