"""The measure-base step: KFP's artifacts in, one typed call, KFP's artifacts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import output_folder, step
from spectraqlora.settings import EvaluateSettings, SelectSettings


@step
def run(
    *,
    methods: str,
    select_settings: dict[str, Any],
    evaluate_settings: dict[str, Any],
    seed: int,
    four_bit: Any,
    rows: Any,
    measurement: Any,
) -> None:
    from spectraqlora.steps.measure_base.measure import Inputs, measure_base

    result = measure_base(
        Inputs(four_bit=Path(four_bit.path), rows=Path(rows.path)),
        [name.strip() for name in methods.split(",")],
        SelectSettings(**select_settings),
        EvaluateSettings(**evaluate_settings),
        seed,
        output_folder(measurement),
    )
    for name, value in result.headline().items():
        measurement.log_metric(name, value)
