"""What a cluster's values file gives to a placed task."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl
from spectraqlora.steps.quantize_load.component import quantize_load
from spectraqlora_pipelines.cluster.values import read_values
from spectraqlora_pipelines.dags.placement import Placement


def _environment(values: str, folder: Path) -> dict[str, str]:
    """The environment of a task of quantize-load under these values."""
    (folder / "values.yaml").write_text(values)
    place = Placement(values=read_values(folder / "values.yaml"))

    @dsl.pipeline(name="one-step")
    def pipeline() -> None:
        place(quantize_load(base_model="sample", content="", model_settings={}), "quantize-load")

    compiler.Compiler().compile(pipeline, str(folder / "pipeline.yaml"))
    compiled: dict[str, Any] = next(yaml.safe_load_all((folder / "pipeline.yaml").read_text()))
    container = compiled["deploymentSpec"]["executors"]["exec-quantize-load"]["container"]
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("{request: 3, limit: 8}", "3"),
        ("{limit: 8}", "8"),
        ("{request: 2500m}", "2"),
        ("{request: 200m, limit: 2}", "1"),
    ],
)
def test_a_step_is_promised_its_request_else_its_limit_in_whole_cores(
    cpu: str, expected: str, tmp_path: Path
) -> None:
    values = f"defaults: {{cpu: {cpu}}}"
    assert _environment(values, tmp_path) == {"SPECTRAQLORA_CPUS": expected}


def test_a_step_without_cpu_values_is_promised_nothing(tmp_path: Path) -> None:
    assert _environment("defaults: {memory: {limit: 2Gi}}", tmp_path) == {}


def test_an_own_variable_wins_over_the_promise(tmp_path: Path) -> None:
    values = 'defaults: {cpu: {limit: 8}, env: {SPECTRAQLORA_CPUS: "5"}}'
    assert _environment(values, tmp_path) == {"SPECTRAQLORA_CPUS": "5"}
