"""The command logs."""

from __future__ import annotations

from typing import Annotated

import typer
from spectraqlora.errors import InputError

from spectraqlora_pipelines.cli.argo import Target, for_argo
from spectraqlora_pipelines.cli.kubeflow import (
    CaFile,
    Host,
    Namespace,
    PodNamespace,
    TokenFile,
    connect,
    pods_are_in,
)
from spectraqlora_pipelines.cli.screen import errors, line
from spectraqlora_pipelines.cli.status import Run


def logs(
    run: Run,
    step: Annotated[str, typer.Argument(metavar="STEP", help="Name of the step, such as train.")],
    method: Annotated[str, typer.Option(metavar="NAME", help="Of this method's branch.")] = "",
    every: Annotated[
        bool, typer.Option("--all", help="Of all attempts and rounds, not of the newest alone.")
    ] = False,
    tail: Annotated[int | None, typer.Option(metavar="N", min=1, help="The last N lines.")] = None,
    target: Target = "kubeflow",
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
    pod_namespace: PodNamespace = "",
) -> None:
    """Print what a step of a run on Kubeflow or Argo has printed.

    Logs are Kubernetes' to give: this needs a kubeconfig of the cluster, and
    lasts as long as the step's pods. A step that was taken from an earlier run
    has none.

    Example: spectraqlora logs 5f0c6f0e-3d5f-4c5e-9d3b-2d0b0c1d9a7e train
    """
    from spectraqlora.runtime.images import step_names

    from spectraqlora_pipelines.cluster.pods import RUN_OF_ARGO, Pods, labelled

    if step not in step_names():
        raise InputError("STEP", step, f"one of the steps {', '.join(step_names())}")
    if for_argo(target):
        from spectraqlora_pipelines.cluster.argo_client import Argo

        argo = Argo(namespace or pod_namespace)
        run_id = argo.workflow(run)["metadata"]["name"]
        pods = Pods(argo.namespace, RUN_OF_ARGO)
    else:
        run_id = connect(host, namespace, token_file, ca_file).run(run).run_id
        pods = Pods(pods_are_in(pod_namespace, namespace))
    those = pods.of(run_id, step, method)
    branches = sorted({labelled(pod)[1] for pod in those})
    if not those:
        raise InputError(
            "STEP", step, "a step whose pods are still there; `spectraqlora status` says how far it came"
        )
    if len(branches) > 1 and not every:
        raise InputError("--method", method, f"one of {', '.join(branches)}, or --all")
    for pod in those if every else those[-1:]:
        if every:
            errors.print(f"{pod.metadata.name} {labelled(pod)[1]}".rstrip(), highlight=False)
        line(pods.log(pod.metadata.name, tail).rstrip("\n"))
