"""Runs in MLflow: one per pipeline run, one nested run per branch, whichever step or retry asks first."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, PreparedRows, TrainingLog
from spectraqlora.errors import InputError
from spectraqlora.places import kind_of
from spectraqlora.runtime.console import say, warn
from spectraqlora.runtime.images import REVISION, step_image
from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.moved import artifact_location
from spectraqlora.tracking.server import ServerAway, connect, explain_errors, transferring

RUN_KEY, BRANCH = "spectraqlora.run_key", "spectraqlora.branch"
KFP_UI, MLFLOW_UI = "SPECTRAQLORA_KFP_UI", "SPECTRAQLORA_MLFLOW_UI"
"""Environment variables: where people reach the two UIs, which links between the runs begin with."""
PLUGINS_RUN = "MLFLOW_RUN_ID"
"""Environment variable in which KFP's MLflow plugin names the MLflow run of the task."""
_LINK = "spectraqlora.mlflow_run"
_PARENT, _WINNER = "pipeline", "spectraqlora.run_id"
_PARAM_LENGTH = 500
_BATCH = 900
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Tracker:
    """Finds or creates the runs of a pipeline run.

    Steps in different pods and their retries agree on one run without talking to each other, because
    MLflow's database accepts some things only once: an experiment's name, and a param's value. The pipeline's
    run is the one that an experiment named after the run key points to (deleted at once, so nobody sees it);
    a branch's run is the one that the pipeline run's param `run.BRANCH` names. Whoever comes second takes the
    first one's run and deletes its own.

    Args:
        settings: the `tracking` section.
        run_key: identifies the pipeline run.
        step: name of the step that asks, for the tags.

    Raises:
        InputError: the tracking server does not answer, or does not let us in.
    """

    def __init__(self, settings: TrackingSettings, run_key: str, step: str = "") -> None:
        self.settings, self.run_key, self.step = settings, run_key, step
        self._runs: dict[str, str] = {}
        self.client = connect(settings)
        with explain_errors(settings):
            self.experiment = self._experiment()

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.settings.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = artifact_location(self.settings.uri)
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self.client.get_experiment_by_name(name)
        if experiment.lifecycle_stage != "active":
            raise InputError("tracking.experiment", name, "an experiment that is not deleted")
        return str(experiment.experiment_id)

    def _tags(self) -> dict[str, str]:
        tags = {RUN_KEY: self.run_key, "spectraqlora.version": __version__}
        if os.environ.get(REVISION):
            tags["mlflow.source.git.commit"] = os.environ[REVISION]
        if _UUID.fullmatch(self.run_key):
            # By the last two KFP's own MLflow plugin names a pipeline run; so one search finds its run and ours.
            tags |= {
                "kfp.run_id": self.run_key,
                "kfp.pipeline_run_id": self.run_key,
                "kfp.pipeline_run_url": self._pipeline_address(),
            }
        return tags

    def _pipeline_address(self) -> str:
        """Where KFP's UI shows the pipeline run; only the path where nobody said where the UI is."""
        return f"{os.environ.get(KFP_UI, '').rstrip('/')}/#/runs/details/{self.run_key}"

    def address(self, run_id: str) -> str:
        """Where MLflow's UI shows a run; empty for a database without a server."""
        root = os.environ.get(MLFLOW_UI) or self.settings.uri
        if not root.startswith(("http://", "https://")):
            return ""
        return f"{root.rstrip('/')}/#/experiments/{self.experiment}/runs/{run_id}"

    def _note(self) -> dict[str, str]:
        """The description that MLflow's UI shows on top of the pipeline's run: a link to KFP's."""
        if not (_UUID.fullmatch(self.run_key) and os.environ.get(KFP_UI)):
            return {}
        return {"mlflow.note.content": f"[Pipeline run {self.run_key}]({self._pipeline_address()})"}

    def _create(self, branch: str, name: str, tags: dict[str, str]) -> str:
        run = self.client.create_run(
            self.experiment, run_name=name, tags={**self._tags(), BRANCH: branch, **tags}
        )
        return str(run.info.run_id)

    def _settle(self, branch: str, chosen: str) -> str:
        """Delete runs that lost, left by attempts that were killed between making and deleting them."""
        query = f"tags.`{RUN_KEY}` = '{self.run_key}' and tags.`{BRANCH}` = '{branch}'"
        for run in self.client.search_runs([self.experiment], query):
            if run.info.run_id != chosen:
                self.client.delete_run(run.info.run_id)
        if self.step:
            self._name_image(chosen)
        self._runs[branch] = chosen
        if branch == _PARENT and self.step:
            self._link(chosen)
        return chosen

    def _name_image(self, run_id: str) -> None:
        """Say which image the step ran in; of two that say it at once, MLflow's database refuses the second."""
        from mlflow.exceptions import MlflowException

        key, value = f"image.{self.step}", step_image()
        try:
            self.client.set_tag(run_id, key, value)
        except MlflowException:
            if self.client.get_run(run_id).data.tags.get(key) != value:
                raise

    def _link(self, run_id: str) -> None:
        """Say where the run is shown, and lead from the run of KFP's own MLflow plugin to ours and back.

        The plugin gives the pipeline run an MLflow run with one nested run per task, whose id it puts into the step's
        environment (proposals/12862-mlflow-integration of kubeflow/pipelines).
        """
        from mlflow.exceptions import MlflowException

        if address := self.address(run_id):
            say(f"MLflow run: {address}")
        task = os.environ.get(PLUGINS_RUN)
        if not task:
            return
        try:
            theirs = self.client.get_run(task).data.tags["mlflow.parentRunId"]
            tags = self.client.get_run(theirs).data.tags
        except (KeyError, MlflowException):
            return  # A run of something else, or in another MLflow.
        if tags.get("kfp.pipeline_run_id") == self.run_key and _LINK not in tags:
            self.client.set_tag(theirs, _LINK, address or run_id)
            self.client.set_tag(run_id, "kfp.mlflow_run", self.address(theirs) or theirs)

    def pipeline_run(self) -> str:
        """Id of the MLflow run of the pipeline run."""
        from mlflow.exceptions import MlflowException

        if _PARENT in self._runs:
            return self._runs[_PARENT]
        ballot = f"{self.settings.experiment}: run {self.run_key}"
        with explain_errors(self.settings):
            decided = self.client.get_experiment_by_name(ballot)
            if decided is None:
                candidate = self._create(_PARENT, self.run_key, self._note())
                try:
                    made = self.client.create_experiment(ballot, tags={_WINNER: candidate})
                    self.client.delete_experiment(made)
                    return self._settle(_PARENT, candidate)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                decided = self.client.get_experiment_by_name(ballot)
            return self._settle(_PARENT, decided.tags[_WINNER])

    def branch_run(self, method: str) -> str:
        """Id of a branch's run, nested in the pipeline's."""
        if method in self._runs:
            return self._runs[method]
        parent, key = self.pipeline_run(), f"run.{method}"
        with explain_errors(self.settings):
            chosen = self.client.get_run(parent).data.params.get(key)
            if chosen is None:
                candidate = self._create(method, method, {"mlflow.parentRunId": parent})
                chosen = write_once(self.client, parent, key, candidate)
            return self._settle(method, chosen)

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
        with explain_errors(self.settings):
            known = self.client.get_run(run_id).data.params
            fresh = [Param(key, value) for key, value in flat.items() if key not in known]
            if fresh:
                self.client.log_batch(run_id, params=fresh)

    def known_steps(self, run_id: str, name: str) -> set[int]:
        """Steps at which a metric is logged already."""
        with explain_errors(self.settings):
            return {m.step for m in self.client.get_metric_history(run_id, name)}

    def log_points(self, run_id: str, points: list[Any]) -> None:
        """Log metric points (MLflow's `Metric`); the very same point twice counts once."""
        with explain_errors(self.settings):
            for start in range(0, len(points), _BATCH):
                self.client.log_batch(run_id, metrics=points[start : start + _BATCH])

    def log_curve(self, run_id: str, name: str, points: list[tuple[int, float]]) -> None:
        """Log a metric over steps; points of an earlier attempt are not logged twice."""
        from mlflow.entities import Metric

        known = self.known_steps(run_id, name) if points else set()
        now = int(time.time() * 1000)
        self.log_points(
            run_id,
            [Metric(name, v, now, step) for step, v in points if step not in known and math.isfinite(v)],
        )

    def log_training(self, run_id: str, log: TrainingLog, max_steps: int) -> None:
        """Log a round's curves, counted on from the rounds before; what is there already stays."""
        offset = (log.round - 1) * max_steps
        for name, points in (("train_loss", log.loss_curve), ("eval_loss_curve", log.eval_curve)):
            self.log_curve(run_id, name, [(step + offset, loss) for step, loss in points])

    def log_metrics(self, run_id: str, values: dict[str, float]) -> None:
        """Log finite numbers; one that is there already with this value is left alone."""
        from mlflow.entities import Metric

        with explain_errors(self.settings):
            known = self.client.get_run(run_id).data.metrics
        now = int(time.time() * 1000)
        fresh = {k: v for k, v in values.items() if math.isfinite(v) and known.get(k) != v}
        self.log_points(run_id, [Metric(k, v, now, 0) for k, v in fresh.items()])

    def log_data(self, run_id: str, data: PreparedRows) -> None:
        """Log each source of the data as an MLflow dataset: name, source, digest and counts of all."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kinds = {"hub": "hugging_face", "s3": "s3"}
        entities = [
            Dataset(
                name=Path(source).name[:100] or "data",
                digest=data.digest[:36],
                source_type=kinds.get(kind_of(source), "local"),
                source=json.dumps({"uri": source}),
                profile=json.dumps({"train_rows": data.train_rows, "eval_rows": data.eval_rows}),
            )
            for source in [part.source for part in data.account.sources] or [data.source]
        ]
        context = [InputTag("mlflow.data.context", "training")]
        with explain_errors(self.settings):
            self.client.log_inputs(run_id, datasets=[DatasetInput(entity, context) for entity in entities])

    def log_evaluation(self, run_id: str, evaluation: Evaluation, metrics: dict[str, float]) -> None:
        """Log what an evaluation holds of its branch: all rounds' curves, numbers and digests."""
        with explain_errors(self.settings):
            params = self.client.get_run(run_id).data.params
        max_steps = int(params.get("train.max_steps", 0))
        for part in evaluation.rounds:
            self.log_training(run_id, part.training, max_steps)
        self.log_metrics(run_id, metrics)
        self.set_tags(run_id, {"base_digest": evaluation.base_digest, "data_digest": evaluation.data_digest})

    def log_file(self, run_id: str, path: Path, folder: str = "") -> None:
        """Keep a file among the run's artifacts."""
        with transferring(self.settings):
            self.client.log_artifact(run_id, str(path), folder or None)

    def log_folder(self, run_id: str, path: Path, folder: str) -> None:
        """Keep a folder's files among the run's artifacts."""
        with transferring(self.settings):
            self.client.log_artifacts(run_id, str(path), folder)

    def has_files(self, run_id: str, folder: str) -> bool:
        """Whether the run keeps artifacts in a folder of this name."""
        with explain_errors(self.settings):
            return bool(self.client.list_artifacts(run_id, folder))

    def tags(self, run_id: str) -> dict[str, str]:
        """A run's tags."""
        with explain_errors(self.settings):
            return dict(self.client.get_run(run_id).data.tags)

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        with explain_errors(self.settings):
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, run_id: str) -> None:
        """Mark a run as finished."""
        with explain_errors(self.settings):
            self.client.set_terminated(run_id, "FINISHED")

    def close_stale(self, status: str) -> dict[str, str]:
        """End the runs of this pipeline run that are still marked as running; their names by id."""
        query = f"tags.`{RUN_KEY}` = '{self.run_key}' and attributes.status = 'RUNNING'"
        with explain_errors(self.settings):
            stale = self.client.search_runs([self.experiment], query)
            for run in stale:
                self.client.set_terminated(run.info.run_id, status)
        return {run.info.run_id: run.info.run_name for run in stale}

    def retry_while_away(self, send: Callable[[], None], what: str) -> bool:
        """Send after the work is done: wait for a server that is away, then give up with a warning.

        Whatever is sent is in the step's artifacts as well, and the next step sends it again.
        """
        deadline = time.monotonic() + self.settings.patience_seconds
        pause = 1.0
        while True:
            try:
                send()
                return True
            except ServerAway as error:
                if time.monotonic() + pause > deadline:
                    warn(
                        f"MLflow at {self.settings.uri} does not answer ({error.why}); {what} is kept in the "
                        "step's artifacts and sent by the next step"
                    )
                    return False
            time.sleep(pause)
            pause = min(pause * 2, 15.0)


def write_once(client: Any, run_id: str, key: str, value: str) -> str:
    """Write a run's param unless it has one; the value that it then has, ours or the one that came first."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_param(run_id, key, value)
        return value
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
    return str(client.get_run(run_id).data.params[key])
