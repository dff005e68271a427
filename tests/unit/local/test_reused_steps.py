"""Which steps a run takes from an earlier one in its work directory."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from spectraqlora.settings import parse
from spectraqlora_pipelines.local.run import run_locally


@dsl.component(install_kfp_package=False)
def prepare(source: str, content: str, data_settings: dict, rows: dsl.Output[dsl.Dataset]):
    import pathlib

    folder = pathlib.Path(rows.path)
    folder.mkdir(parents=True)
    (folder / "length").write_text(str(min(data_settings["max_length"], 100)))


@dsl.component(install_kfp_package=False)
def train(
    method: str,
    train_settings: dict,
    checkpoint_settings: dict,
    rows: dsl.Input[dsl.Dataset],
    adapter: dsl.Output[dsl.Model],
):
    import pathlib

    folder = pathlib.Path(adapter.path)
    folder.mkdir(parents=True)
    text = (pathlib.Path(rows.path) / "length").read_text()
    (folder / "adapter").write_text(f"{method} {train_settings} {text}")


@dsl.pipeline
def branch(method: str, given: dict, checkpoint: dict, rows: dsl.Input[dsl.Dataset]):
    train(method=method, train_settings=given, checkpoint_settings=checkpoint, rows=rows).set_display_name(
        "train (hybrid)"
    )


@dsl.pipeline
def other_branch(method: str, given: dict, checkpoint: dict, rows: dsl.Input[dsl.Dataset]):
    train(method=method, train_settings=given, checkpoint_settings=checkpoint, rows=rows).set_display_name(
        "train (qlora)"
    )


def pipeline(methods: tuple[str, ...]) -> Any:
    branches = {"hybrid": branch, "qlora": other_branch}

    @dsl.pipeline
    def made(source: str, content: str, data: dict, given: dict, checkpoint: dict):
        prepared = prepare(source=source, content=content, data_settings=data)
        prepared.set_display_name("prepare-data")
        for method in methods:
            branches[method](method=method, given=given, checkpoint=checkpoint, rows=prepared.outputs["rows"])

    return made


def run(workdir: Path, methods: tuple[str, ...] = ("hybrid",), **changed: Any) -> dict[str, str | None]:
    """Run the steps; for each why it ran, or None where it was taken from an earlier run."""
    workdir.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "source": "rows.jsonl",
        "content": "1a",
        "data": {"max_length": 64},
        "given": {"max_steps": 2},
        "checkpoint": {"folder": str(workdir / "artifacts" / "checkpoints")},
        **changed,
    }
    told: dict[str, str | None] = {}
    run_locally(pipeline(methods), given, "key", workdir, None, told.__setitem__, lambda *told: None)
    return told


def test_a_changed_setting_runs_the_steps_that_read_it_and_says_which_it_is(tmp_path: Path) -> None:
    assert run(tmp_path) == {"prepare-data": "", "train (hybrid)": ""}
    assert run(tmp_path, given={"max_steps": 3}) == {
        "prepare-data": None,
        "train (hybrid)": "train.max_steps was 2 and is now 3",
    }
    assert run(tmp_path) == {"prepare-data": None, "train (hybrid)": None}, "and back again"
    assert run(tmp_path, given={"max_steps": 4})["train (hybrid)"] == "train.max_steps was 2 and is now 4"
    again = run(tmp_path, content="2b", data={"max_length": 32})
    assert again == {
        "prepare-data": "content of data.source was '1a' and is now '2b' (1 more changed)",
        "train (hybrid)": "",
    }


def test_a_step_that_wrote_the_same_as_before_leaves_the_rest_alone(tmp_path: Path) -> None:
    run(tmp_path, data={"max_length": 200})
    told = run(tmp_path, data={"max_length": 300})
    assert told == {"prepare-data": "data.max_length was 200 and is now 300", "train (hybrid)": None}


def test_what_changes_no_result_runs_no_step_again(tmp_path: Path) -> None:
    run(tmp_path)
    assert set(run(tmp_path, checkpoint={"folder": "/elsewhere", "every_steps": 5}).values()) == {None}


def test_another_method_leaves_the_steps_of_the_first_alone(tmp_path: Path) -> None:
    run(tmp_path)
    assert run(tmp_path, ("qlora", "hybrid")) == {
        "prepare-data": None,
        "train (hybrid)": None,
        "train (qlora)": "it has not finished here before",
    }


def test_an_input_that_changed_on_disk_is_named_without_its_digest(tmp_path: Path) -> None:
    run(tmp_path)
    for beside in tmp_path.rglob("rows.sha256"):
        beside.write_text("another")
    assert run(tmp_path)["train (hybrid)"] == "rows has other content"


def test_a_workdir_that_was_moved_or_renamed_is_reused_with_its_paths(tmp_path: Path) -> None:
    run(tmp_path / "work")
    shutil.move(tmp_path / "work", tmp_path / "a moved?#one~")
    assert set(run(tmp_path / "a moved?#one~").values()) == {None}


def test_a_result_that_was_removed_is_made_again(tmp_path: Path) -> None:
    run(tmp_path)
    for path in tmp_path.rglob("adapter"):
        if path.is_dir():
            shutil.rmtree(path)
    told = run(tmp_path)
    assert told["prepare-data"] is None
    assert told["train (hybrid)"] == "its result is not there any more, or the step itself is another"
    for entry in (tmp_path / "artifacts" / ".steps").iterdir():
        entry.write_text("{")
    assert None not in run(tmp_path).values(), "a record that was cut short is none"


@dsl.component(install_kfp_package=False)
def measure(methods: str, select_settings: dict) -> str:
    return methods


@dsl.pipeline
def measuring(methods: str, select: dict):
    measure(methods=methods, select_settings=select).set_display_name("measure-base")


@pytest.mark.parametrize(
    ("first", "then", "reused"),
    [
        ("qlora,hybrid", "hybrid", True),
        ("qlora,hybrid", "qlora", True),
        ("qlora", "random", True),
        ("qlora", "hybrid", False),
    ],
)
def test_a_measurement_of_the_base_serves_all_methods_that_need_no_more(
    first: str, then: str, reused: bool, tmp_path: Path
) -> None:
    told: dict[str, str | None] = {}
    for methods in (first, then):
        given = {"methods": methods, "select": parse({}).select.model_dump(mode="json")}
        run_locally(measuring, given, "key", tmp_path, None, told.__setitem__, lambda *told: None)
    assert (told["measure-base"] is None) is reused
