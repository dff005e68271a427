"""The KFP component of measure-base."""

from kfp import dsl

from spectraqlora.runtime.component import component


@component(image="re-evaluate")
def measure_base(
    methods: str,
    select_settings: dict,
    evaluate_settings: dict,
    seed: int,
    four_bit: dsl.Input[dsl.Model],
    rows: dsl.Input[dsl.Dataset],
    measurement: dsl.Output[dsl.Metrics],
):
    """Score the base model and, where a method needs them, sketch its gradients: once for all branches.

    Args:
        methods: names of all branches, separated by commas.
        select_settings: the `select` section.
        evaluate_settings: the `evaluate` section.
        seed: of the calibration rows and the sketches' projections.
        four_bit: the 4-bit model.
        rows: prepared rows; held-out and test rows are scored, training rows are the calibration batches.
        measurement: loss of every held-out row, accuracy, and the gradient sketches where they are needed.
    """
    from spectraqlora.steps.measure_base.step import run

    run(
        methods=methods,
        select_settings=select_settings,
        evaluate_settings=evaluate_settings,
        seed=seed,
        four_bit=four_bit,
        rows=rows,
        measurement=measurement,
    )
