"""The train step where several machines train: it hands over its inputs, starts a TrainJob, and takes what they made.

The step's own pod waits and computes nothing. A retry has the same job and the same folder in the bucket: it takes up
the job that is under way, or starts one that resumes from the newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from spectraqlora.errors import InputError
from spectraqlora.runtime.console import fail
from spectraqlora.runtime.deferred_signals import deferred_signals
from spectraqlora.settings import TrainSettings
from spectraqlora.steps.train import distributed
from spectraqlora.steps.train.checkpoints import identity
from spectraqlora.steps.train.exchange import fetch_adapter, publish_inputs, remove_inputs
from spectraqlora.steps.train.request import TrainRequest
from spectraqlora.steps.train.train_job import TEMPLATE, JobFailed, TrainJob
from spectraqlora.storage import parse_address

EXCHANGE = "nodes"
"""What is handed over is below checkpoint.destination, in a folder of this name, in one of the job's."""


def train_on_nodes(request: TrainRequest) -> None:
    """Train a request on `train.nodes` machines, and put the adapter into its output folder.

    Ends the process with code 2 where a machine refused its input, with 75 where a service did not answer it, with 1 where
    the job failed for another reason.

    Raises:
        InputError: settings or a place that several machines cannot train with, or a refusal of Kubernetes or the store.
        Stopped: by SIGTERM or SIGINT; the machines are asked for a checkpoint.
    """
    template = _template(request.train.nodes)
    each = _processes(request.train, template)
    total = request.train.nodes * each
    distributed.split_batch(request.train, total)
    name = job_name(request, total)
    place = (
        parse_address(request.checkpoint.destination, "checkpoint.destination").child(EXCHANGE).child(name)
    )
    with deferred_signals() as stopped:
        try:
            TrainJob(name).run(
                _job(template, request, each, str(place)), lambda: publish_inputs(request, place), stopped
            )
        except JobFailed as error:
            fail(str(error))
            sys.exit(error.exit_code)
    with tempfile.TemporaryDirectory() as scratch:
        fetch_adapter(place, request.output, Path(scratch))
    # The adapter stays: a retry, where this pod is lost before its output is kept, finds a job that is complete.
    remove_inputs(request, place)


def job_name(request: TrainRequest, processes: int) -> str:
    """The name of a run's TrainJob for a training: the same for a retry, another for each branch and round."""
    text = f"{request.run_key} {identity(request, processes)}"
    return f"train-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _template(nodes: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.environ[TEMPLATE]))
    except (KeyError, ValueError, TypeError):
        raise InputError(
            "train.nodes", nodes, "1, or a pipeline that was compiled for a cluster with this number"
        ) from None


def _processes(settings: TrainSettings, template: dict[str, Any]) -> int:
    """Training processes of each machine: as asked for, else one per GPU, else one."""
    limits = template["spec"]["trainer"].get("resourcesPerNode", {}).get("limits", {})
    gpus = sum(int(count) for name, count in limits.items() if name not in ("cpu", "memory"))
    if gpus and settings.processes > gpus:
        raise InputError("train.processes", settings.processes, f"at most {gpus}, the GPUs of each machine")
    return settings.processes or max(gpus, 1)


def _job(template: dict[str, Any], request: TrainRequest, processes: int, address: str) -> dict[str, Any]:
    """The template with what belongs to this training."""
    # Kubernetes replaces $(NAME) in arguments.
    text = request.text().replace("$", "\\u0024")
    trainer = {
        **template["spec"]["trainer"],
        "numNodes": request.train.nodes,
        "numProcPerNode": processes,
        "args": [address, text],
    }
    return {**template, "spec": {**template["spec"], "trainer": trainer}}
