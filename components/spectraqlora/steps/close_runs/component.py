"""The KFP component of close-runs."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="light")
def close_runs(
    tracking_settings: dict,
    status: dsl.PipelineTaskFinalStatus,
    closed: dsl.Output[dsl.Artifact],
):
    """End this pipeline run's MLflow runs that no step has ended: FAILED, or KILLED where the pipeline was canceled.

    It runs after all other steps, however they ended: a run that MLflow still shows as running then belongs to a
    step that failed or was killed. It asks for no other step's artifacts, which may never have been written.

    Args:
        tracking_settings: the `tracking` section.
        status: how the other steps ended, as KFP says it.
        closed: ids and names of the runs that were closed, as JSON.
    """
    from spectraqlora.steps.close_runs.step import run

    run(tracking_settings=tracking_settings, status=status, closed=closed)
