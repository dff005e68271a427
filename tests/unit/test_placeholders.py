"""What of a run's own values reaches its steps: its id by the pods' label, and no placeholder that KFP leaves as text."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from spectraqlora.methods import catalogue as methods
from spectraqlora.runtime import run_key
from spectraqlora.settings import parse
from spectraqlora_pipelines.cluster.values import ClusterValues, read_values
from spectraqlora_pipelines.dags.catalogue import Dag, compile_dag

from tests.unit.compiled_dag import Compiled

ROOT = Path(__file__).resolve().parents[2]
PIPELINES: list[tuple[Dag, dict[str, Any]]] = [
    ("ablation", {"methods": ",".join(methods.names()), "rounds": 1}),
    ("ablation", {"methods": ",".join(methods.names()), "rounds": 2}),
    *(
        ("retraining", {"rounds": rounds, "retrain": {"method": method, "start": start}})
        for method in ("hybrid", "sgm")
        for rounds in (1, 2)
        for start in ("base", "champion")
    ),
]


def compiled(kind: Dag, values: dict[str, Any], placed: ClusterValues | None) -> list[dict[str, Any]]:
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "pipeline.yaml"
        compile_dag(path, kind, parse(values), placed)
        return list(yaml.safe_load_all(path.read_text()))


def places_where_text_stays(document: Any, inside_default: bool = False) -> list[str]:
    """Placeholders in defaults: KFP replaces them in constants of a task's own arguments alone."""
    if isinstance(document, str):
        return [document] if inside_default and "{{" in document else []
    if isinstance(document, list):
        return [text for part in document for text in places_where_text_stays(part, inside_default)]
    if isinstance(document, dict):
        return [
            text
            for key, part in document.items()
            for text in places_where_text_stays(part, inside_default or key == "defaultValue")
        ]
    return []


def test_a_default_with_a_placeholder_is_seen() -> None:
    """The form of version 0.1.0, whose steps printed the placeholder on a real KFP."""
    root = {"inputDefinitions": {"parameters": {"run_key": {"defaultValue": "{{$.pipeline_job_uuid}}"}}}}
    assert places_where_text_stays({"root": root}) == ["{{$.pipeline_job_uuid}}"]
    nested = {"inputs": {"parameters": {"given": {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}}}}
    assert places_where_text_stays({"root": nested}) == []


@pytest.mark.parametrize(("kind", "values"), PIPELINES, ids=str)
def test_no_placeholder_stands_in_a_default_or_comes_through_a_component_input(
    kind: Dag, values: dict[str, Any]
) -> None:
    pipeline, _ = compiled(kind, values, None)
    assert places_where_text_stays(pipeline) == []
    for task in Compiled(pipeline).tasks():
        for name, value in task.values.items():
            if name not in task.parameters:
                assert "{{" not in str(value), f"{task.name}: {name} is {value}"
            else:
                assert "{{$.pipeline" not in str(value), f"{task.name}: {name} would be in its cache key"


@pytest.mark.parametrize("placed", [False, True], ids=["without values", "with values"])
@pytest.mark.parametrize("kind", ["ablation", "retraining"])
def test_every_step_gets_the_runs_id_from_its_pods_label(kind: Dag, placed: bool) -> None:
    values = read_values(ROOT / "tests" / "golden" / "values-full.yaml") if placed else None
    pipeline, platform = compiled(kind, {"rounds": 2}, values)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors.keys() == pipeline["deploymentSpec"]["executors"].keys()
    for executor in executors.values():
        assert {
            "name": run_key.VARIABLE,
            "fieldPath": "metadata.labels['pipeline/runid']",
        } in executor["fieldPathAsEnv"]
