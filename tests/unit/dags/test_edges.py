"""What each step of a compiled pipeline is handed: what its component's signature names, from the step that makes it."""

from collections import Counter
from functools import cache
from typing import Any

import pytest
from spectraqlora.methods import catalogue as methods
from spectraqlora.runtime import command_line
from spectraqlora.settings import parse
from spectraqlora_pipelines.dags.catalogue import Dag, steps

from tests.unit.compiled_dag import Compiled, compiled_from

READS_WEIGHTS = {"measure-base", "train", "re-evaluate", "merge-export"}
"""The steps that load the 4-bit model. All others get its outline, or nothing of it."""
MADE_BY = {
    "four_bit": {"quantize-load.four_bit"},
    "outline": {"quantize-load.outline"},
    "rows": {"prepare-data.rows"},
    "table": {"snr-analyze.table"},
    "measurement": {"measure-base.measurement"},
    "rank_map": {"select-layers.rank_map", "start-point.start_rank_map", "re-evaluate.next_rank_map"},
    "adapter": {"train.adapter"},
    "previous": {"re-evaluate.next_adapter", "re-evaluate.evaluation"},
    "start": {"start-point.start_adapter"},
    "winner": {"compare.winner"},
    "leaderboard": {"compare.leaderboard"},
    "exported": {"merge-export.exported"},
    "registered": {"register.registered"},
    **{name: {"re-evaluate.evaluation"} for name in methods.names()},
    **{f"{name}_adapter": {"train.adapter"} for name in methods.names()},
}
"""For the name of every artifact input, the outputs that may be handed to it."""
PIPELINES: dict[str, tuple[Dag, dict[str, Any]]] = {
    "ablation": ("ablation", {"methods": ",".join(methods.names()), "rounds": 2}),
    "one method": ("ablation", {"methods": "qlora"}),
    "retraining": ("retraining", {"rounds": 3}),
    "from champion": ("retraining", {"retrain": {"start": "champion", "method": "alors"}}),
    "quantized SNR": ("ablation", {"snr": {"source": "quantized"}}),
}


@cache
def compiled(name: str) -> Compiled:
    kind, values = PIPELINES[name]
    return compiled_from(kind, values)


def signature(step: str) -> tuple[set[str], set[str]]:
    """Names of a component's artifact inputs: all, and those that must be given."""
    inputs = [o for o in command_line.options(command_line.component(step)) if o.kind == "input"]
    return {o.name for o in inputs}, {o.name for o in inputs if o.default is not None}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_is_handed_what_its_component_declares_from_the_step_that_makes_it(name: str) -> None:
    tasks = compiled(name).tasks()
    assert len(tasks) > 8
    for task in tasks:
        declared, required = signature(task.step)
        assert required <= task.reads.keys() <= declared, task
        for input_, source in task.reads.items():
            assert source in MADE_BY[input_], f"{task.name}: {input_} is {source}"


@pytest.mark.parametrize("name", PIPELINES)
def test_no_pod_receives_a_model_that_it_does_not_read(name: str) -> None:
    allowed = READS_WEIGHTS | ({"snr-analyze"} if name == "quantized SNR" else set())
    tasks = compiled(name).tasks()
    assert {t.step for t in tasks if "quantize-load.four_bit" in t.reads.values()} == allowed
    declared = {step for step in command_line.steps() if "four_bit" in signature(step)[0]}
    assert declared == READS_WEIGHTS | {"snr-analyze"}
    assert {step for step in declared if "four_bit" in signature(step)[1]} == READS_WEIGHTS


def test_select_layers_reads_neither_model_nor_rows() -> None:
    reads = [task.reads for task in compiled("ablation").tasks() if task.step == "select-layers"]
    assert len(reads) == len(methods.names())
    for read in reads:
        assert read == {
            "outline": "quantize-load.outline",
            "table": "snr-analyze.table",
            "measurement": "measure-base.measurement",
        }


@pytest.mark.parametrize("name", PIPELINES)
def test_the_base_is_measured_in_one_task_for_all_branches(name: str) -> None:
    kind, values = PIPELINES[name]
    (measure,) = [task for task in compiled(name).tasks() if task.step == "measure-base"]
    settings = parse(values)
    branches = settings.methods if kind == "ablation" else (settings.retrain.method,)
    assert sorted(measure.parameters["methods"].split(",")) == sorted(branches)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_method_that_never_moves_has_one_round_and_trains_the_steps_of_all(rounds: int) -> None:
    tasks = compiled_from("ablation", {"methods": ",".join(methods.names()), "rounds": rounds}).tasks()
    for name in methods.names():
        own = [task for task in tasks if f"({name})" in task.name or f"({name}, " in task.name]
        count = rounds if methods.method(name).moves else 1
        assert Counter(task.step for task in own) == {
            "select-layers": 1, "train": count, "re-evaluate": count,
        }  # fmt: skip
        for task in own:
            if task.step in ("train", "re-evaluate"):
                assert task.parameters["rounds"] == rounds


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *PIPELINES.values(),
        ("ablation", {"methods": "sgm,alors", "rounds": 3}),
        ("retraining", {"rounds": 3, "retrain": {"method": "qlora", "start": "champion"}}),
    ],
)
def test_the_number_of_steps_is_counted_right(kind: Dag, values: dict[str, Any]) -> None:
    here = [task for task in compiled_from(kind, values).tasks() if task.step != "close-runs"]
    assert steps(kind, parse(values)) == len(here), "a run on this machine has no exit task"


def test_compare_hands_out_the_report_as_an_html_artifact() -> None:
    outputs = compiled("ablation").components["comp-compare"]["outputDefinitions"]["artifacts"]
    assert outputs["report"]["artifactType"]["schemaTitle"] == "system.HTML"
