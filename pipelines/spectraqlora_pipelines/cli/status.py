"""The command status."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from spectraqlora_pipelines.cli.argo import Target, for_argo
from spectraqlora_pipelines.cli.kubeflow import (
    CaFile,
    Host,
    Namespace,
    PodNamespace,
    TokenFile,
    Ui,
    connect,
    pods_are_in,
)
from spectraqlora_pipelines.cli.screen import Screen, console, errors, line

if TYPE_CHECKING:
    from rich.tree import Tree

    from spectraqlora_pipelines.cluster.progress import Step
    from spectraqlora_pipelines.cluster.view import View

Run = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, or its name: the newest of it.")]
_COLOURS = {"done": "green", "cached": "green", "running": "cyan", "failed": "red", "stopped": "red"}


def status(
    run: Run,
    target: Target = "kubeflow",
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    ca_file: CaFile = "",
    ui: Ui = "",
    pod_namespace: PodNamespace = "",
) -> None:
    """Show how far a run on Kubeflow or Argo is, step by step.

    States and times come from Kubeflow Pipelines. Why a step failed or waits is
    Kubernetes' to say: with a kubeconfig of the cluster, or inside of it, this
    says that as well.

    Example: spectraqlora status 5f0c6f0e-3d5f-4c5e-9d3b-2d0b0c1d9a7e
    """
    from spectraqlora_pipelines.cluster.view import Viewer

    if for_argo(target):
        from spectraqlora_pipelines.cluster.argo_client import Argo
        from spectraqlora_pipelines.cluster.argo_view import ArgoViewer

        view = ArgoViewer(Argo(namespace or pod_namespace)).look(run)
        where = f"workflow {view.run.run_id}"
    else:
        server = connect(host, namespace, token_file, ca_file)
        view = Viewer(server, pods_are_in(pod_namespace, namespace)).look(run)
        where = server.run_address(view.run.run_id, ui)
    line(f"Run {view.run.display_name}: {view.run.state}  {where}")
    # In a file or a pipe a reason is one line, however long.
    (console if console.is_terminal else Screen(width=10_000)).print(_tree(view))
    if view.unseen:
        errors.print(f"Why steps failed or wait is not known: {view.unseen}", highlight=False)


def _tree(view: View) -> Tree:
    from rich.tree import Tree

    now = datetime.now(UTC)
    root = Tree(_line(view.tree, now))

    def grow(tree: Tree, step: Step) -> None:
        for part in step.parts:
            branch = tree.add(_line(part, now))
            if part.label in view.reasons and part.step:
                branch.add(Text(view.reasons[part.label], "red"))
            grow(branch, part)

    grow(root, view.tree)
    if not view.tree.parts and view.tree.message:
        root.add(Text(view.tree.message, "red"))
    return root


def _line(step: Step, now: datetime) -> Text:
    from spectraqlora_pipelines.cluster.progress import duration

    colour = _COLOURS.get(step.state, "dim")
    began = f"  {step.started:%H:%M:%S}" if step.started else ""
    took = f"  {duration(step, now)}" if step.started else ""
    tries = f"  attempt {step.attempts}" if step.attempts > 1 else ""
    return Text.assemble(f"{step.label}  ", (step.state, colour), f"{began}{took}{tries}")
