"""MLflow's files of a work directory that was moved, and of a copy of it."""

import shutil
import sqlite3
from pathlib import Path

from mlflow.tracking._tracking_service import utils
from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.moved import follow_move
from spectraqlora.tracking.runs import Tracker


def tracker(workdir: Path) -> Tracker:
    # MLflow remembers where a run's artifacts are for as long as its process lives.
    utils._artifact_repos_cache.clear()
    return Tracker(TrackingSettings(uri=f"sqlite:///{workdir}/mlflow.db"), "run")


def read(workdir: Path, name: str) -> str:
    run = tracker(workdir).pipeline_run()
    return Path(tracker(workdir).client.download_artifacts(run, name)).read_text()


def test_a_moved_workdirs_artifacts_are_found_beside_it_and_a_copys_in_the_copy(tmp_path: Path) -> None:
    work, moved, copied = tmp_path / "work", tmp_path / "moved ü~", tmp_path / "copied"
    work.mkdir()
    note, more = tmp_path / "note.txt", tmp_path / "more.txt"
    note.write_text("noted")
    more.write_text("more")
    first = tracker(work)
    run = first.pipeline_run()
    first.log_file(run, note)
    first.client.create_registered_model("m")
    source = f"{work.as_uri()}/mlartifacts/models/m-1/artifacts"
    first.client.create_model_version(
        "m", source, run, tags={"export": f"{work}/artifacts/x", "other": "work/x"}
    )
    shutil.move(work, moved)
    assert read(moved, "note.txt") == "noted"
    version = tracker(moved).client.get_model_version("m", "1")
    assert version.source == f"{moved.as_uri()}/mlartifacts/models/m-1/artifacts"
    assert version.tags == {"export": f"{moved}/artifacts/x", "other": "work/x"}
    tracker(moved).log_file(run, more)
    assert not work.exists() and read(moved, "more.txt") == "more"

    shutil.copytree(moved, copied)
    tracker(copied).log_file(run, more, "again")
    assert read(copied, "again/more.txt") == "more" and not list(moved.rglob("again"))
    assert read(moved, "note.txt") == "noted", "the original is as it was"
    link = tmp_path / "link"
    link.symlink_to(moved)
    assert read(link, "note.txt") == "noted"
    with sqlite3.connect(moved / "mlflow.db") as store:
        (kept,) = store.execute(
            "select artifact_location from experiments where name = 'spectraqlora'"
        ).fetchone()
    assert kept == f"{moved.as_uri()}/mlartifacts", "another name of the same folder changes nothing"


def test_what_is_no_database_of_ours_is_left_alone(tmp_path: Path) -> None:
    for uri in ("http://mlflow:5000", f"sqlite:///{tmp_path}/none.db"):
        follow_move(uri)
    (tmp_path / "mlartifacts").mkdir()
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        store.execute("create table other (x)")
    before = (tmp_path / "mlflow.db").read_bytes()
    follow_move(f"sqlite:///{tmp_path}/mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == before and not (tmp_path / "none.db").exists()
