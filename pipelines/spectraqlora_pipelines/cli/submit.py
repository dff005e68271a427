"""The command submit."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from spectraqlora.errors import InputError, NoAnswer
from spectraqlora.runtime.console import ERROR
from spectraqlora.settings import Settings, digest

from spectraqlora_pipelines.cli.argo import Target, Wanted, for_argo, submit_to_argo, wanted
from spectraqlora_pipelines.cli.kubeflow import (
    CaFile,
    Experiment,
    Host,
    Namespace,
    Package,
    Pipeline,
    PipelineName,
    PipelineRoot,
    PodNamespace,
    ServiceAccount,
    TokenFile,
    Ui,
    Values,
    connect,
    launch,
    launched_settings,
    placed_values,
    pods_are_in,
    run_again,
    upload,
)
from spectraqlora_pipelines.cli.options import ConfigOrVariable, PresetOrVariable, Set
from spectraqlora_pipelines.cli.screen import errors, line

if TYPE_CHECKING:
    from spectraqlora_pipelines.cluster.argo_view import ArgoViewer
    from spectraqlora_pipelines.cluster.view import View, Viewer

    Looking = Viewer | ArgoViewer

POLL_SECONDS = 10.0
PATIENCE_SECONDS = 300.0
"""How long a watched server may be away."""


def submit(
    preset: PresetOrVariable = "default",
    config: ConfigOrVariable = None,
    set_: Set = None,
    values: Values = None,
    target: Target = "kubeflow",
    pipeline: Pipeline = "ablation",
    package: Package = None,
    name: Annotated[
        str,
        typer.Option(
            envvar="SPECTRAQLORA_RUN_NAME", show_envvar=False, metavar="NAME", help="Name of the run."
        ),
    ] = "",
    upload_only: Annotated[
        bool,
        typer.Option(
            "--upload-only",
            envvar="SPECTRAQLORA_UPLOAD_ONLY",
            show_envvar=False,
            help="Upload the version and start nothing.",
        ),
    ] = False,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            envvar="SPECTRAQLORA_NO_CACHE",
            show_envvar=False,
            help="Take no step's result from an earlier run, as when a bucket has removed some.",
        ),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay until the run ends; exit code 1 where it failed.")
    ] = False,
    resubmit: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="With --watch: submit a failed run again, up to N times."),
    ] = 0,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
    pipeline_name: PipelineName = "",
    experiment: Experiment = "",
    service_account: ServiceAccount = "",
    pipeline_root: PipelineRoot = "",
    ui: Ui = "",
    pod_namespace: PodNamespace = "",
) -> None:
    """Upload the pipeline to Kubeflow or Argo, and start a run.

    A version is named by program version and content, so the same pipeline is
    uploaded once. The run's arguments come from the settings; what base, data
    and table hold now is part of them, so that what was replaced in place is not
    taken from an earlier run. A run submitted again takes finished steps from the
    one before, and training resumes from its checkpoints (checkpoint.destination).

    Example: spectraqlora submit --host http://localhost:8080 --config my.yaml
    """
    _check(no_cache, watch, resubmit, upload_only)
    if for_argo(target):
        run_of = wanted(pipeline, config, set_, preset, values, package, pipeline_name, service_account)
        _submit_to_argo(run_of, name, namespace or pod_namespace, upload_only, watch, resubmit)
        return
    settings, arguments = launched_settings(pipeline, config, set_, not (upload_only or no_cache), preset)
    placed = placed_values(values, package)
    server = connect(host, namespace, token_file, ca_file)
    uncached = () if no_cache else None if upload_only else run_again(pipeline, settings, arguments)
    uploaded = upload(server, settings, pipeline, pipeline_name, package, placed, uncached)
    if upload_only:
        return
    run_name = name or f"{pipeline} {digest(settings)[:8]}"
    how = launch(settings, placed, experiment, service_account, pipeline_root)
    ui = ui or (placed.run.ui if placed else "")

    def start() -> str:
        run = server.submit(uploaded, run_name, arguments, how)
        line(f"Run {run_name}: {server.run_address(run, ui)}")
        return run

    run = start()
    if watch:
        from spectraqlora_pipelines.cluster.view import Viewer

        _follow(Viewer(server, pods_are_in(pod_namespace, namespace)), run, start, resubmit, settings)


def _submit_to_argo(
    run: Wanted, name: str, namespace: str, upload_only: bool, watch: bool, resubmit: int
) -> None:
    from spectraqlora_pipelines.cluster.argo_client import Argo
    from spectraqlora_pipelines.cluster.argo_view import ArgoViewer

    argo = Argo(namespace)

    def start() -> str:
        return submit_to_argo(argo, run, name, upload_only)

    started = start()
    if watch:
        _follow(ArgoViewer(argo), started, start, resubmit, run.settings)


def _check(no_cache: bool, watch: bool, resubmit: int, upload_only: bool) -> None:
    if resubmit and not watch:
        raise InputError("--resubmit", resubmit, "--watch, since a run that nobody watches ends unseen")
    if resubmit and no_cache:
        raise InputError(
            "--resubmit", resubmit, "no --no-cache, without which finished steps are not repeated"
        )
    if watch and upload_only:
        raise InputError("--watch", True, "no --upload-only, which starts nothing")


def _follow(viewer: Looking, run: str, start: Callable[[], str], resubmit: int, settings: Settings) -> None:
    """Stay until the run ends, and start it again while it fails.

    Raises:
        StepFailed: the last one failed.
    """
    from spectraqlora_pipelines.local.run import StepFailed

    if resubmit and not settings.checkpoint.destination:
        errors.print(
            "warning: checkpoint.destination: '': a run submitted again begins its training anew",
            highlight=False,
        )
    for left in range(resubmit, -1, -1):
        view = _watch(viewer, run)
        if view.run.state == "SUCCEEDED":
            line(f"Run {view.run.display_name} succeeded")
            return
        ends = [f"{step.label}: {view.reasons.get(step.label, step.state)}" for step in view.failed()]
        failure = f"run {view.run.display_name} is {view.run.state}{''.join(f'; {end}' for end in ends)}"
        # A step says so of its input, which is the same the next time; and who cancels a run wants it to end.
        refused = any(
            reason.startswith(f"{ERROR} ") and not reason.startswith(f"{ERROR} {NoAnswer.prefix}")
            for reason in view.reasons.values()
        )
        if view.run.state != "FAILED" or refused or not left:
            raise StepFailed(failure)
        line(f"{failure}; submitted again, {left - 1} times are left")
        run = start()


def _watch(viewer: Looking, run: str) -> View:
    """Look at a run until it ends, and say how each of its steps changes."""
    said: dict[str, str] = {}
    answered = time.monotonic()
    while True:
        try:
            view = viewer.look(run)
            answered = time.monotonic()
        except InputError:
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        for step in view.tree.leaves():
            reason = view.reasons.get(step.label, "")
            text = f"{step.label}: {step.state}{f': {reason}' if reason else ''}"
            if step.state != "waiting" and said.get(step.label) != text:
                said[step.label] = text
                line(f"{datetime.now():%H:%M:%S} {text}")
        if view.ended:
            return view
        time.sleep(POLL_SECONDS)
