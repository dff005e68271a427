"""A run's results come from its own outputs, whatever the times of the files say."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from kfp import dsl
from spectraqlora.errors import InputError
from spectraqlora_pipelines.local.outputs import RunOutputs, read_outputs
from spectraqlora_pipelines.local.run import StepFailed, run_locally


@dsl.component(install_kfp_package=False)
def shared(text: str, made: dsl.Output[dsl.Artifact]):
    import pathlib

    folder = pathlib.Path(made.path)
    folder.mkdir(parents=True)
    (folder / "text").write_text(text)


@dsl.component(install_kfp_package=False)
def ask(text: str) -> str:
    return text


@dsl.component(install_kfp_package=False)
def last(made: dsl.Input[dsl.Artifact], extra: str, final: dsl.Output[dsl.HTML]):
    import pathlib

    path = pathlib.Path(final.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((pathlib.Path(made.path) / "text").read_text() + extra)


@dsl.pipeline
def branch(text: str) -> dsl.Artifact:
    task = shared(text=text)
    task.set_display_name("train (hybrid, round 1)")
    return task.outputs["made"]


@dsl.pipeline
def pipeline(text: str, extra: str):
    asked = ask(text=text)
    asked.set_caching_options(False)
    with dsl.If(asked.output != "unchanged"):
        inner = branch(text=text)
        last(made=inner.output, extra=extra)


def ignore(*told: object) -> None:
    """A listener that does not listen."""


def run(workdir: Path, text: str, extra: str) -> tuple[RunOutputs, list[str]]:
    workdir.mkdir(exist_ok=True)
    started: list[str] = []
    given = {"text": text, "extra": extra}

    def on_task(name: str, why: str | None) -> None:
        started.append(name)

    return run_locally(pipeline, given, "key of the run", workdir, None, on_task, ignore), started


def test_two_runs_in_one_workdir_each_report_their_own_though_the_first_ones_files_are_newer(
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "work"
    first, started = run(workdir, "a", "1")
    assert started == ["ask", "train (hybrid, round 1)", "last"]
    assert first.path("last", "final").read_text() == "a1"
    for path in [workdir, *workdir.rglob("*")]:
        os.utime(path, (time.time() + 172_800,) * 2)
    second, _ = run(workdir, "b", "2")
    assert second.path("last", "final").read_text() == "b2"
    assert (second.path("train (hybrid, round 1)", "made") / "text").read_text() == "b"
    assert first.path("last", "final").read_text() == "a1"


def test_steps_know_the_key_of_their_run_and_take_from_the_cache_what_another_run_made(
    tmp_path: Path,
) -> None:
    @dsl.component(install_kfp_package=False)
    def say_key() -> str:
        import os

        return os.environ["SPECTRAQLORA_RUN_KEY"]

    @dsl.pipeline
    def asked():
        say_key()

    for key in ("first", "second"):
        run_locally(asked, {}, key, tmp_path, None, ignore, ignore)
        (said,) = {
            json.loads(path.read_text())["parameterValues"]["Output"]
            for path in tmp_path.rglob("executor_output.json")
        }
        assert said == "first", "the second run takes it from the cache"
    assert "SPECTRAQLORA_RUN_KEY" not in os.environ


def test_what_comes_from_the_cache_is_an_output_of_the_run_that_took_it(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "work", "a", "1")
    run(tmp_path / "work", "b", "1")
    third, started = run(tmp_path / "work", "a", "3")
    assert started == ["ask", "train (hybrid, round 1)", "last"], "steps from the cache are counted too"
    step = "train (hybrid, round 1)"
    assert third.path(step, "made") == first.path(step, "made")
    assert third.path("last", "final") != first.path("last", "final")
    assert third.path("last", "final").read_text() == "a3"


ODD = "a b#c?d%20é=~ü&'x"


def test_a_workdir_may_have_any_name_that_a_file_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from spectraqlora.runtime.cache import cache_folder, plainly_named

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    workdir = tmp_path / ODD
    first, _ = run(workdir, "a", "1")
    assert first.path("last", "final").is_relative_to(workdir)
    assert first.path("last", "final").read_text() == "a1"
    first.write()
    assert read_outputs(workdir).path("last", "final").read_text() == "a1"
    uri = f"sqlite:///{plainly_named(workdir)}/mlflow.db"
    MlflowClient(tracking_uri=uri).create_experiment("x")
    assert (workdir / "mlflow.db").stat().st_size > 0
    assert plainly_named(workdir) == plainly_named(workdir) and plainly_named(tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ODD, "cache"])
    assert cache_folder() == tmp_path / "cache" / "spectraqlora"


@dsl.component(install_kfp_package=False)
def fails(text: str) -> str:
    import sys

    try:
        raise RuntimeError(f"no room for {text}")
    except RuntimeError:
        import traceback

        traceback.print_exc()
    for number in range(300):
        print("cleaning up", number)
    sys.exit(1)


@dsl.pipeline
def failing(text: str):
    task = fails(text=text)
    task.set_display_name("train (hybrid, round 1)")


def test_a_failing_steps_own_error_is_what_the_command_shows_however_much_it_wrote_after_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(StepFailed) as failed:
        run_locally(failing, {"text": "it"}, "key", tmp_path, None, ignore, ignore)
    wanted = f"train (hybrid, round 1) failed: RuntimeError: no room for it (read {tmp_path / 'run.log'})"
    assert str(failed.value) == wanted
    assert "===== train (hybrid, round 1) =====" in (tmp_path / "run.log").read_text()


def test_steps_that_a_condition_leaves_out_have_no_outputs(tmp_path: Path) -> None:
    run(tmp_path / "work", "a", "1")
    second, started = run(tmp_path / "work", "unchanged", "2")
    assert started == ["ask"]
    with pytest.raises(InputError, match="a finished run; final of last is not there"):
        second.path("last", "final")


def test_the_record_survives_a_move_of_the_workdir(tmp_path: Path) -> None:
    outputs, _ = run(tmp_path / "work", "a", "1")
    outputs.write()
    shutil.move(tmp_path / "work", tmp_path / "moved")
    found = read_outputs(tmp_path / "moved")
    assert found.path("last", "final").read_text() == "a1"
    assert found.path("last", "final").is_relative_to(tmp_path / "moved")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{}",
        '{"steps": []}',
        '{"steps": {"compare": ["winner"]}}',
        '{"steps": {"compare": {"winner": 1}}}',
    ],
)
def test_a_workdir_without_a_readable_record_is_refused_in_one_line(
    content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "outputs.json").write_text(content)
    with pytest.raises(InputError) as refused:
        read_outputs(tmp_path)
    assert str(refused.value).startswith(f"WORKDIR: '{tmp_path}': expected the workdir of a finished run")


def test_a_path_that_leads_out_of_the_workdir_is_not_recorded(tmp_path: Path) -> None:
    outputs = RunOutputs(tmp_path / "work", {"train": {"adapter": tmp_path / "elsewhere"}})
    with pytest.raises(ValueError, match="elsewhere"):
        outputs.write()


def test_the_record_is_plain_json_with_paths_below_the_workdir(tmp_path: Path) -> None:
    RunOutputs(tmp_path, {"compare": {"winner": tmp_path / "artifacts" / "w"}}).write()
    stored = json.loads((tmp_path / "outputs.json").read_text())
    assert stored["steps"] == {"compare": {"winner": "artifacts/w"}}
