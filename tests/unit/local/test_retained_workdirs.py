"""`spectraqlora gc` in work directories and in the user's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kfp import dsl
from spectraqlora.artifacts import SCHEMA_VERSION
from spectraqlora.errors import InputError
from spectraqlora.runtime import cache, threads
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.local.outputs import RunOutputs
from spectraqlora_pipelines.local.preflight import LOCK, WorkdirLock
from spectraqlora_pipelines.local.reuse import StepResults, Work
from typer.testing import CliRunner

DAY = 86_400.0


def gc(*arguments: str) -> str:
    done = CliRunner().invoke(app.app, ["gc", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def aged(place: Path, days: float) -> Path:
    then = time.time() - days * DAY
    for path in [*place.rglob("*"), place]:
        os.utime(path, (then, then))
    return place


class Workdir:
    """A work directory as `spectraqlora run` leaves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self.artifacts.mkdir(parents=True)
        document = {"artifacts": SCHEMA_VERSION, "settings": {"tracking": {"uri": ""}}}
        (folder / "run.json").write_text(json.dumps(document))

    def step(self, run: str, name: str, days: float, cached: bool = True) -> Path:
        artifact = self.artifacts / run / name / "adapter"
        artifact.mkdir(parents=True)
        (artifact / "weights.safetensors").write_bytes(b"x" * 2048)
        if cached:
            work = Work(name, cached=True, command=[run], arguments={})
            StepResults(self.folder).keep(work, {"adapter": dsl.Model(name="adapter", uri=str(artifact))})
        aged(artifact.parent, days)
        return artifact

    def finished(self, steps: dict[str, Path], days: float) -> None:
        RunOutputs(self.folder, {name: {"adapter": path} for name, path in steps.items()}).write()
        aged(self.folder / "outputs.json", days)


@pytest.fixture(autouse=True)
def no_server_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow leaves the address that a test before this one gave it in the environment, where --uri looks."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def work(tmp_path: Path) -> Workdir:
    return Workdir(tmp_path / "runs" / "work")


def test_what_the_latest_finished_run_does_not_use_goes_and_the_rest_stays(
    work: Workdir, tmp_path: Path
) -> None:
    used = work.step("run-1", "train", 50)
    earlier = work.step("run-0", "train", 60)
    again = work.step("run-2", "train", 20)
    stopped = work.step("run-2", "merge-export", 20, cached=False)
    checkpoints = aged(work.step("checkpoints", "0" * 32, 50, cached=False).parent, 50)
    left = work.folder / "merged.partial"
    left.mkdir()
    aged(left, 45)
    (work.folder / "merged").mkdir()
    work.finished({"train": used}, 40)
    other = tmp_path / "runs" / "notes"
    other.mkdir()
    arguments = [str(tmp_path / "runs"), "--older-than", "15d"]

    shown = gc(*arguments)
    assert earlier.exists(), "nothing is deleted without --delete"
    assert "Can go: 4, 6.0 KiB" in shown and "Stays: 1, 0 B: no work directory of a run" in shown
    assert "Stays: 1, 2.0 KiB: the latest finished run uses it" in shown
    assert "Stays: 1, 2.0 KiB: of a run that has not finished" in shown, "the next run takes that step up"
    assert f"gc {tmp_path / 'runs'} --older-than 15d --delete" in shown

    gc(*arguments, "--delete")
    assert used.exists() and again.exists() and (work.folder / "merged").exists() and other.exists()
    assert not any(path.exists() for path in (earlier, stopped, checkpoints, left))
    assert "Nothing can go." in gc(*arguments)


def test_the_export_of_a_registered_version_stays(work: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workdir's own MLflow says so, whatever server the environment names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    from spectraqlora.settings import TrackingSettings
    from spectraqlora.tracking.runs import Tracker

    export = work.step("run-0", "merge-export", 60)
    work.finished({"merge-export": work.step("run-1", "merge-export", 50)}, 40)
    tracker = Tracker(TrackingSettings(uri=f"sqlite:///{work.folder}/mlflow.db"), "run")
    run = tracker.pipeline_run()
    tracker.client.create_registered_model("spectraqlora")
    tracker.client.create_model_version(
        "spectraqlora", f"runs:/{run}/m", run, tags={"export_uri": str(export)}
    )
    assert "the export of spectraqlora version 1" in gc(str(work.folder), "--delete") and export.exists()
    tracker.client.delete_model_version("spectraqlora", "1")
    gc(str(work.folder), "--delete")
    assert not export.exists()


def test_where_a_run_works_nothing_goes(work: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    old = work.step("run-0", "train", 60, cached=False)
    lock = WorkdirLock(work.folder)
    assert "a run works there" in gc(str(work.folder), "--delete", "--older-than", "0m") and old.exists()
    lock.close()
    # One that begins between the look and the removal.
    from spectraqlora_pipelines.cli import gc as command

    show: Callable[..., None] = command._show
    held = []

    def begin(*given: object) -> None:
        show(*given)
        held.append(WorkdirLock(work.folder))

    monkeypatch.setattr(command, "_show", begin)
    with pytest.raises(InputError, match="in which no run works; one has begun"):
        gc(str(work.folder), "--delete")
    assert old.exists()
    held.pop().close()
    monkeypatch.setattr(command, "_show", show)
    gc(str(work.folder), "--delete")
    assert not old.exists() and (work.folder / LOCK).exists()


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ('{"settings": {}}', "of another version"),
        ('{"artifacts": 1, "settings": {}}', "of another version"),
        ("{", "of another version"),
        ("[" * 10_000, "of another version"),
    ],
)
def test_workdirs_of_other_versions_are_left_alone(work: Workdir, document: str, reason: str) -> None:
    (work.folder / "run.json").write_text(document)
    old = work.step("run-0", "train", 600, cached=False)
    assert reason in gc(str(work.folder), "--delete") and old.exists()


def test_a_place_that_is_none_is_one_line(tmp_path: Path) -> None:
    for place in (str(tmp_path / "gone"), __file__):
        with pytest.raises(InputError, match="PLACE"):
            gc(place, "--delete")
    with pytest.raises(InputError, match="PLACE"):
        gc("s3://bucket/../other", "--uri", "http://127.0.0.1:9", "--delete")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(threads, "_shared_folder", lambda: tmp_path / "steps")
    monkeypatch.chdir(tmp_path)
    return cache.cache_folder()


def test_copies_that_nobody_used_for_long_go_from_the_cache(home: Path, tmp_path: Path) -> None:
    for name, days in (("s3/old/folder", 50), ("s3/used/folder", 50), ("sample-v1", 50), ("sample-v12", 50),
                       ("snr", 1), (".sample-x", 50), ("theirs", 50), ("folders", 1)):  # fmt: skip
        (home / name).mkdir(parents=True)
        (home / name / "file").write_text("x") if name != "folders" else None
        aged(home / name, days)
    aged(home / "s3" / "old", 50)
    (home / "s3" / "used" / "lock").touch()  # As every use of a copy does.
    (home / "folders" / "there").symlink_to(tmp_path)
    (home / "folders" / "gone").symlink_to(tmp_path / "gone")
    os.utime(home / "folders" / "gone", (1, 1), follow_symlinks=False)
    shown = gc("--delete")
    assert "a copy from object storage: not used since" in shown and "nothing that this program put" in shown
    left = {path.relative_to(home).as_posix() for path in home.glob("*/*")} | {p.name for p in home.iterdir()}
    assert {"s3/used", "sample-v12", "snr/file", "theirs", "folders/there"} <= left
    assert not {"s3/old", "sample-v1", ".sample-x", "folders/gone"} & left


def test_while_a_step_is_at_work_the_copies_that_it_may_read_stay(home: Path, tmp_path: Path) -> None:
    copy = home / "s3" / "old"
    copy.mkdir(parents=True)
    aged(copy, 50)
    enter = (
        "import sys; from pathlib import Path; from spectraqlora.runtime.threads import Neighbours; "
        f"n = Neighbours(Path({str(tmp_path / 'steps')!r})); print('there', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", enter], stdin=-1, stdout=-1, text=True) as step:
        assert step.stdout is not None and step.stdout.readline() == "there\n"
        assert "steps are at work" in gc("--delete") and copy.exists()
        step.communicate()
    gc("--delete")
    assert not copy.exists()
