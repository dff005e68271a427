"""The task that runs however a pipeline ends: around everything, never cached, waiting for no artifact."""

from typing import Any

import pytest
from spectraqlora.settings import parse
from spectraqlora.steps.close_runs.ends import end_of
from spectraqlora_pipelines.dags.catalogue import Dag, dag, write_yaml
from spectraqlora_pipelines.dags.placement import Placement

from tests.unit.compiled_dag import Compiled, compiled_from

PIPELINES: list[tuple[Dag, dict[str, Any]]] = [
    ("ablation", {"methods": "qlora"}),
    ("ablation", {"rounds": 2}),
    ("retraining", {"rounds": 2}),
    ("retraining", {"retrain": {"start": "champion"}}),
]


@pytest.mark.parametrize(("kind", "values"), PIPELINES)
def test_the_exit_task_is_around_all_other_steps(kind: Dag, values: dict[str, Any]) -> None:
    compiled = compiled_from(kind, values)
    tasks = compiled.root["tasks"]
    (around,) = tasks.keys() - {"close-runs"}
    closing = tasks["close-runs"]
    assert closing["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert closing["dependentTasks"] == [around] and closing["cachingOptions"] == {}
    assert closing["inputs"].keys() == {"parameters"}, "no artifact, which may never be written"
    assert closing["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": around}}
    inside = compiled.components[tasks[around]["componentRef"]["name"]]["dag"]["tasks"]
    assert "close-runs" not in inside and len(compiled.tasks()) > len(inside)


def test_a_dag_for_this_machine_goes_without(tmp_path: Any) -> None:
    import yaml

    path = tmp_path / "local.yaml"
    write_yaml(dag("retraining", parse({}), Placement(retries=0)), path)
    compiled = Compiled(next(yaml.safe_load_all(path.read_text())))
    assert "close-runs" not in {task.step for task in compiled.tasks()}
    assert "exit-handler-1" not in compiled.root["tasks"]


@pytest.mark.parametrize(
    ("state", "end"),
    [
        ("COMPLETE", "FINISHED"),
        ("SUCCEEDED", "FINISHED"),
        ("FAILED", "FAILED"),
        ("RUNNING", "FAILED"),
        ("CANCELED", "KILLED"),
        ("CANCELLED", "KILLED"),
        ("", "FAILED"),
    ],
)
def test_an_end_follows_from_kfps_word_where_it_has_one(state: str, end: str) -> None:
    assert end_of(state) == end
