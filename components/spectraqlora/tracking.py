"""The only module that talks to MLflow: one run per pipeline run, one nested run per branch."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from spectraqlora.errors import InputError
from spectraqlora.settings import TrackingSettings

RUN_KEY, BRANCH = "spectraqlora.run_key", "spectraqlora.branch"
_PARAM_LENGTH = 500
_BATCH = 900


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


class Tracker:
    """Finds or creates the runs of a pipeline run, whichever step or retry asks first.

    Raises:
        InputError: the tracking server does not answer.
    """

    def __init__(self, settings: TrackingSettings, run_key: str) -> None:
        import logging

        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.run_key = run_key
        try:
            self.client = MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)
            found = self.client.get_experiment_by_name(settings.experiment)
            self.experiment = found.experiment_id if found else self._create(settings)
        except (MlflowException, OSError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise InputError(
                "tracking.uri", _without_credentials(settings.uri), f"a reachable MLflow server ({first})"
            ) from None

    def _create(self, settings: TrackingSettings) -> str:
        location = None
        if settings.uri.startswith("sqlite:///"):
            location = (Path(settings.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        return str(self.client.create_experiment(settings.experiment, artifact_location=location))

    def _run(self, branch: str, name: str, tags: dict[str, str]) -> str:
        query = f"tags.`{RUN_KEY}` = '{self.run_key}' and tags.`{BRANCH}` = '{branch}'"
        found = self.client.search_runs([self.experiment], query, max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = self.client.create_run(
            self.experiment, run_name=name, tags={RUN_KEY: self.run_key, BRANCH: branch, **tags}
        )
        return str(run.info.run_id)

    def pipeline_run(self) -> str:
        """Id of the run that stands for the whole pipeline run."""
        return self._run("pipeline", self.run_key, {})

    def branch_run(self, method: str) -> str:
        """Id of a branch's run, nested in the pipeline's."""
        return self._run(method, method, {"mlflow.parentRunId": self.pipeline_run()})

    def log_params(self, run_id: str, values: dict[str, Any]) -> None:
        """Log nested settings as dotted params; values that are there already stay."""
        from mlflow.entities import Param

        flat: dict[str, str] = {}

        def collect(prefix: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    collect(f"{prefix}.{key}" if prefix else str(key), inner)
            else:
                flat[prefix] = (value if isinstance(value, str) else json.dumps(value))[:_PARAM_LENGTH]

        collect("", values)
        known = self.client.get_run(run_id).data.params
        fresh = [Param(key, value) for key, value in flat.items() if key not in known]
        if fresh:
            self.client.log_batch(run_id, params=fresh)

    def log_curve(self, run_id: str, name: str, points: list[tuple[int, float]]) -> None:
        """Log a metric over steps; points of an earlier attempt are not logged twice."""
        from mlflow.entities import Metric

        known = {m.step for m in self.client.get_metric_history(run_id, name)} if points else set()
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, value in points if step not in known]
        for start in range(0, len(metrics), _BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def log_metrics(self, run_id: str, values: dict[str, float]) -> None:
        """Log finite numbers."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(
            run_id, metrics=[Metric(k, v, now, 0) for k, v in values.items() if math.isfinite(v)]
        )

    def log_file(self, run_id: str, path: Path, folder: str = "") -> None:
        """Keep a file among the run's artifacts."""
        self.client.log_artifact(run_id, str(path), folder or None)

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, run_id: str) -> None:
        """Mark a run as finished."""
        self.client.set_terminated(run_id, "FINISHED")
