"""A bucket as runs of Kubeflow Pipelines leave it, and the MLflow that knows them, for tests of gc."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from spectraqlora.runtime.step import MADE_FROM
from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.needs import CHECKPOINTS
from spectraqlora.tracking.registry import OWN_TAG
from spectraqlora.tracking.runs import Tracker

from tests.s3 import BUCKET, Server

ROOT = "v2/artifacts"
DAY = 86_400.0


class Bucket:
    """Writes where the S3 server reads: objects of any age."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.folder = server.folder / BUCKET

    def put(self, key: str, text: str, days: float) -> str:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self.age(key, days)
        return key

    def age(self, prefix: str, days: float) -> None:
        """Give everything of this prefix the time that it had so many days ago."""
        then = time.time() - days * DAY
        place = self.folder / prefix
        for path in [place, *place.rglob("*")]:
            os.utime(path, (then, then))
        self._server.forget()

    def names(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}

    def artifact(
        self,
        run: str,
        step: str,
        name: str,
        days: float,
        made_from: list[str] | None = None,
        silent: bool = False,
    ) -> str:
        """One step's execution with one artifact and its log, as KFP's driver lays them out; the artifact's address."""
        execution = f"{ROOT}/spectraqlora-ablation/{run}/{step}/{uuid.uuid4()}"
        self.put(f"{execution}/{name}/weights.safetensors", step * 100, days)
        self.put(f"{execution}/executor-logs-0", "lines", days)
        if not silent:
            self.put(f"{execution}/{name}/{MADE_FROM}", json.dumps({"made_from": made_from or []}), days)
        return f"minio://{BUCKET}/{execution}/{name}"

    def checkpoint(self, training: str, days: float) -> str:
        """A checkpoint as it is published; the folder of its training."""
        folder = f"checkpoints/{training}"
        self.put(f"{folder}/step-000000005-0a1b2c3d/_files-{'0' * 16}/state.safetensors", "x" * 500, days)
        self.put(f"{folder}/step-000000005-0a1b2c3d/_manifest.json", "{}", days)
        return folder


class Known:
    """What MLflow knows of the runs.

    Args:
        uri: of a server or a database.
    """

    def __init__(self, uri: str) -> None:
        self.settings = TrackingSettings(uri=uri, experiment="kept")

    def run(self, key: str = "", status: str = "FINISHED", tags: dict[str, str] | None = None) -> str:
        """A pipeline run with one branch; its key."""
        key = key or str(uuid.uuid4())
        tracker = Tracker(self.settings, key)
        for run_id in (tracker.pipeline_run(), tracker.branch_run("qlora")):
            tracker.set_tags(run_id, tags or {})
            if status != "RUNNING":
                tracker.client.set_terminated(run_id, status)
        return key

    def training(self, identity: str, status: str = "FINISHED") -> str:
        """A run whose branch trained with checkpoints of this identity; its key."""
        return self.run(status=status, tags={f"{CHECKPOINTS}{identity}": "round 1"})

    def end(self, key: str) -> None:
        Tracker(self.settings, key).close_stale("FINISHED")

    def version(self, key: str, alias: str = "", stage: str = "", **tags: str) -> int:
        """A registered version of a run."""
        tracker = Tracker(self.settings, key)
        client: Any = tracker.client
        run = tracker.pipeline_run()
        name = self.settings.registered_model
        if not any(model.name == name for model in client.search_registered_models()):
            client.create_registered_model(name)
        given = {OWN_TAG: key, **tags}
        number = int(client.create_model_version(name, f"runs:/{run}/model", run, tags=given).version)
        if alias:
            client.set_registered_model_alias(name, alias, str(number))
        if stage:
            client.transition_model_version_stage(name, str(number), stage)
        return number


def place(folder: Path) -> str:
    """URI of an MLflow database in a folder."""
    return f"sqlite:///{folder}/mlflow.db"
