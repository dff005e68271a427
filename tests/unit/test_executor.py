"""KFP's own executor, fed with every compiled step's command and with inputs as a real KFP hands them over."""

import functools
import inspect
import json
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from kfp.dsl import executor_main
from spectraqlora.artifacts import RankMap
from spectraqlora.methods import catalogue as methods
from spectraqlora.places import base_place
from spectraqlora.runtime import command_line
from spectraqlora.runtime.step import step
from spectraqlora.settings import SelectSettings, Settings, TrackingSettings
from spectraqlora.steps.detect_changes.changes import recipe_with
from spectraqlora_pipelines.dags.catalogue import Dag

from tests.kfp_form import as_kfp_hands_over
from tests.measured import write_measurement
from tests.unit.compiled_dag import Compiled, Task, compiled_from
from tests.unit.steps.compare.test_comparison import LOSSES
from tests.unit.steps.compare.test_comparison import inputs as compare_inputs

RECORDED = Path(__file__).parent / "recorded"
ALL = ",".join(methods.names())
PIPELINES: dict[str, tuple[Dag, dict[str, Any]]] = {
    "ablation, 1 round": ("ablation", {"methods": ALL}),
    "ablation, 2 rounds": ("ablation", {"methods": ALL, "rounds": 2}),
    "one branch": ("ablation", {"methods": "hybrid"}),
    "SNR of 4-bit weights": ("ablation", {"methods": "alors", "snr": {"source": "quantized"}}),
    **{
        f"retraining {method}, {start}, {rounds} rounds": (
            "retraining",
            {"rounds": rounds, "retrain": {"method": method, "start": start}},
        )
        for method in ("qlora", "hybrid", "alors", "sgm")
        for start in ("base", "champion")
        for rounds in (1, 2)
    },
}
_ = compare_inputs  # a fixture


@cache
def compiled(name: str) -> Compiled:
    kind, values = PIPELINES[name]
    return compiled_from(kind, values)


@cache
def options(step: str) -> dict[str, command_line.Option]:
    return {option.name: option for option in command_line.options(command_line.component(step))}


@cache
def kinds_of_task() -> dict[str, Task]:
    """One task for every step and every set of artifacts that some pipeline gives it."""
    kinds: dict[str, Task] = {}
    for name in PIPELINES:
        for task in compiled(name).tasks():
            optional = [key for key in task.reads if options(task.step)[key].default is None]
            kinds.setdefault(f"{task.step} {' '.join(sorted(optional))}".strip(), task)
    return kinds


def executor_input(
    step: str, folder: Path, artifacts: dict[str, Path], parameters: dict[str, Any], returns: bool = False
) -> dict[str, Any]:
    """What kfp.local would hand to a step, in the form of a real KFP."""
    known = options(step)
    handed = {
        name: {
            "artifacts": [
                {
                    "name": name,
                    "type": {"schemaTitle": known[name].artifact.schema_title},  # type: ignore[union-attr]
                    "uri": str(path),
                    "metadata": {"rows": 340},
                }
            ]
        }
        for name, path in artifacts.items()
    }
    written = {
        name: {
            "artifacts": [
                {
                    "name": name,
                    "type": {"schemaTitle": option.artifact.schema_title},  # type: ignore[union-attr]
                    "uri": str(folder / name),
                }
            ]
        }
        for name, option in known.items()
        if option.kind == "output"
    }
    outputs: dict[str, Any] = {"artifacts": written, "outputFile": str(folder / "executor_output.json")}
    texts = [name for name, option in known.items() if option.kind == "text"] + ["Output"] * returns
    if texts:
        outputs["parameters"] = {name: {"outputFile": str(folder / name)} for name in texts}
    return as_kfp_hands_over(
        {"inputs": {"artifacts": handed, "parameterValues": parameters}, "outputs": outputs}
    )


def function_and_source(command: list[str]) -> tuple[str, str]:
    """Name and source of the function that a compiled command runs."""
    source = next(part for part in command if "import kfp" in part)
    return command[command.index("--function_to_execute") + 1], source


def run_compiled(command: list[str], given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The compiled command itself, as a pod runs it, its placeholder filled in."""
    filled = [json.dumps(given) if part == "{{$}}" else part for part in command]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(filled, env=environment, capture_output=True, text=True, timeout=300, check=False)


def form(executor_input: dict[str, Any]) -> None:
    """Hold an executor input against what is known of a real KFP's."""
    for given in executor_input["inputs"]["artifacts"].values():
        (artifact,) = given["artifacts"]
        assert artifact.keys() - {"type"} == {"name", "uri", "metadata"} and artifact["name"].isdigit()
        assert artifact.get("type", {"instanceSchema": ""}) == {"instanceSchema": ""}
        assert {"display_name", "store_session_info"} <= artifact["metadata"].keys()
    for given in executor_input["outputs"]["artifacts"].values():
        assert given["artifacts"][0]["type"]["schemaTitle"].startswith("system.")
    assert "executor-logs" in executor_input["outputs"]["artifacts"]


@pytest.mark.parametrize("path", sorted(RECORDED.glob("executor-*.json")), ids=lambda path: path.stem)
def test_inputs_have_the_form_that_was_recorded(path: Path, tmp_path: Path) -> None:
    recorded = json.loads(path.read_text())
    form(recorded)
    kinder = json.loads(path.read_text())
    for given in kinder["inputs"]["artifacts"].values():
        given["artifacts"][0] |= {"name": "given", "type": {"schemaTitle": "system.Artifact"}}
    del kinder["outputs"]["artifacts"]["executor-logs"]
    made = as_kfp_hands_over(kinder)
    form(made)
    assert made["inputs"].keys() == recorded["inputs"].keys()
    assert made["inputs"]["parameterValues"] == recorded["inputs"]["parameterValues"]
    assert made["outputs"].keys() == recorded["outputs"].keys()


@pytest.mark.parametrize("kind", kinds_of_task())
def test_the_executor_hands_every_step_what_it_was_given(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = kinds_of_task()[kind]
    artifacts = {name: tmp_path / "in" / name for name in task.reads}
    returns = task.step == "detect-changes"
    given = executor_input(task.step, tmp_path / "out", artifacts, task.values, returns)
    name, source = function_and_source(task.command)
    module = import_module(f"spectraqlora.steps.{name}.step")
    calls: list[dict[str, Any]] = []
    real = inspect.signature(module.run)

    @functools.wraps(module.run.__wrapped__)
    def record(**values: Any) -> str | None:
        real.bind(**values)
        calls.append(values)
        return "unchanged" if returns else None

    monkeypatch.setattr(module, "run", step(record))
    monkeypatch.setenv("_KFP_RUNTIME", "true")
    (tmp_path / "ephemeral_component.py").write_text(source)
    arguments = [
        *("--component_module_path", str(tmp_path / "ephemeral_component.py")),
        *("--function_to_execute", name, "--executor_input", json.dumps(given)),
    ]
    monkeypatch.setattr(sys, "argv", ["executor", *arguments])
    executor_main.executor_main()

    (call,) = calls
    flat = {**call, **{key: pair[0] for key, pair in call.get("branches", {}).items()}}
    flat |= {f"{key}_adapter": pair[1] for key, pair in call.get("branches", {}).items()}
    for key, option in options(task.step).items():
        if key not in flat:
            assert option.kind not in ("input", "output"), f"{key} reaches no one"
        elif option.kind == "input":
            if key not in task.reads:
                assert flat[key] is None
            else:
                assert isinstance(flat[key], dsl.Artifact) and flat[key].path == str(artifacts[key])
        elif option.kind == "output":
            assert isinstance(flat[key], option.artifact or dsl.Artifact)
        elif option.kind == "int":
            assert type(flat[key]) is int and flat[key] == task.values[key]
        elif key.endswith("_settings"):
            section = type(getattr(Settings(), key.removesuffix("_settings")))
            assert section(**flat[key]) == section(**task.values[key])
        elif key == "status":
            assert (flat[key].state, flat[key].pipeline_task_name) == ("COMPLETE", "exit-handler-1")
        elif option.kind == "text":
            assert flat[key] == str(tmp_path / "out" / key)
        else:
            assert flat[key] == task.values[key]


def test_every_component_is_among_the_tasks_of_some_pipeline() -> None:
    kinds = kinds_of_task()
    assert {task.step for task in kinds.values()} == set(command_line.steps())
    for name in command_line.steps():
        optional = {o.name for o in options(name).values() if o.kind == "input" and o.default is None}
        given = [set(task.reads) & optional for task in kinds.values() if task.step == name]
        assert set().union(*given) == optional, f"{name}: an input is never given"
        assert not set.intersection(*given), f"{name}: an input is never left out"


@pytest.mark.parametrize("name", PIPELINES)
def test_no_command_carries_optional_artifacts_and_no_task_gets_one_twice(name: str) -> None:
    pipeline = compiled(name)
    for executor in pipeline.executors.values():
        assert "Optional[dsl.Input" not in "".join(executor["container"]["command"])
    for task in pipeline.tasks():
        places = [json.dumps(place) for place in task.document["inputs"].get("artifacts", {}).values()]
        assert len(places) == len(set(places)), f"{task.name} gets one artifact twice: {places}"


def run_step(
    step: str, folder: Path, artifacts: dict[str, Path], parameters: dict[str, Any], returns: bool = False
) -> dict[str, Any]:
    """Run a step's compiled command; what it wrote as KFP's executor output."""
    task = next(task for task in kinds_of_task().values() if task.step == step)
    given = executor_input(step, folder, artifacts, {**task.values, **parameters}, returns)
    done = run_compiled(task.command, given)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(json.loads((folder / "executor_output.json").read_text()))


def tracking(tmp_path: Path) -> dict[str, Any]:
    return TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db").model_dump(mode="json")


def test_compare_runs_with_branches_given_and_not_given(compare_inputs: Any, tmp_path: Path) -> None:
    artifacts = {
        "outline": compare_inputs.outline,
        "rows": compare_inputs.rows,
        "table": compare_inputs.table,
    }
    for method in LOSSES:
        artifacts[method] = compare_inputs.evaluations[method]
        artifacts[f"{method}_adapter"] = compare_inputs.adapters[method]
    output = run_step("compare", tmp_path / "out", artifacts, {"tracking_settings": tracking(tmp_path)})
    (winner,) = output["artifacts"]["winner"]["artifacts"]
    assert winner["metadata"]["method"] == "hybrid"
    assert "hybrid" in (tmp_path / "out" / "report").read_text()


def test_the_light_steps_run_in_turn_each_on_what_the_one_before_wrote(
    quantized: Path, outline: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    server = {"tracking_settings": tracking(tmp_path)}
    source = {"source": str(tiny_rows)}
    sources = {**source, "base_model": str(tiny_model)}
    changes = run_step("detect-changes", tmp_path / "changes", {}, {**sources, **server}, returns=True)
    assert len(changes["parameterValues"]["Output"]) == 64
    written = {
        name: (tmp_path / "changes" / name).read_text()
        for name in ("base_digest", "table_digest", "full_recipe")
    }
    assert written["base_digest"] == base_place(str(tiny_model)).digest()
    assert written["table_digest"] == "none"
    assert written["full_recipe"] == recipe_with("", written["base_digest"], "none")

    run_step("prepare-data", tmp_path / "prepared", {"outline": outline}, source)
    rows = tmp_path / "prepared" / "rows"
    run_step("snr-analyze", tmp_path / "analyzed", {"outline": outline}, {})
    table = tmp_path / "analyzed" / "table"
    section = SelectSettings()
    measurement = write_measurement(quantized, rows, section, 1, tmp_path / "measurement", ("hybrid",))

    given = {"outline": outline, "table": table, "measurement": measurement}
    select = {"method": "hybrid", "select_settings": section.model_dump(mode="json")}
    selected = run_step("select-layers", tmp_path / "selected", given, select)
    fresh = RankMap.read(tmp_path / "selected" / "rank_map")
    assert selected["artifacts"]["rank_map"]["artifacts"][0]["metadata"]["active"] == len(fresh.active()) > 0

    run_step("start-point", tmp_path / "start", {"rank_map": tmp_path / "selected" / "rank_map"}, server)
    assert RankMap.read(tmp_path / "start" / "start_rank_map") == fresh
