"""What submit and schedule have in common: the connection, what is uploaded, and how it is launched.

Their options are environment variables too: jobs in a cluster, such as those of the chart, set these.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from spectraqlora.errors import InputError
from spectraqlora.settings import Settings

from spectraqlora_pipelines.cli.options import load_settings
from spectraqlora_pipelines.cli.screen import errors, line

if TYPE_CHECKING:
    from spectraqlora_pipelines.cluster.client import Kubeflow, Launch, Uploaded
    from spectraqlora_pipelines.cluster.values import ClusterValues

PREFIX = "SPECTRAQLORA_"
TOKEN, COOKIE = "SPECTRAQLORA_KFP_TOKEN", "SPECTRAQLORA_KFP_COOKIE"
"""Environment variables that hold the secrets; there are no options for them, so that no shell remembers."""
SERVER = "Kubeflow Pipelines"
"""Panel of the options that say where the server is and how to be let in."""


def option(help: str, variable: str | list[str], metavar: str, panel: str | None = None) -> Any:
    """An option that is an environment variable too."""
    return typer.Option(envvar=variable, help=help, metavar=metavar, rich_help_panel=panel, show_envvar=False)


Host = Annotated[
    str,
    option("Its address.", ["SPECTRAQLORA_KFP_HOST", "KF_PIPELINES_ENDPOINT"], "URL", SERVER),
]
Namespace = Annotated[
    str, option("Profile namespace of a multi-user Kubeflow.", "SPECTRAQLORA_KFP_NAMESPACE", "NAME", SERVER)
]
TokenFile = Annotated[
    str,
    option(
        "Bearer token, read again when it changes.",
        ["SPECTRAQLORA_KFP_TOKEN_FILE", "KF_PIPELINES_SA_TOKEN_PATH"],
        "FILE",
        SERVER,
    ),
]
CaFile = Annotated[
    str, option("Certificates that vouch for the host.", "SPECTRAQLORA_KFP_CA_FILE", "FILE", SERVER)
]
Pipeline = Annotated[str, option("ablation or retraining.", "SPECTRAQLORA_PIPELINE", "NAME")]
PipelineName = Annotated[
    str,
    option("Pipeline's name; spectraqlora-PIPELINE.", "SPECTRAQLORA_PIPELINE_NAME", "NAME", SERVER),
]
Package = Annotated[
    Path | None,
    option("Take this compiled YAML.", "SPECTRAQLORA_PIPELINE_PACKAGE", "FILE"),
]
Values = Annotated[
    Path | None,
    option("How each step runs, as for compile.", "SPECTRAQLORA_CLUSTER_VALUES", "FILE"),
]
Experiment = Annotated[
    str,
    option("Its experiment; that of tracking.experiment.", "SPECTRAQLORA_KFP_EXPERIMENT", "NAME", SERVER),
]
ServiceAccount = Annotated[
    str, option("Service account of the steps.", "SPECTRAQLORA_KFP_SERVICE_ACCOUNT", "NAME", SERVER)
]
PipelineRoot = Annotated[
    str, option("s3:// address of the steps' artifacts.", "SPECTRAQLORA_PIPELINE_ROOT", "URL", SERVER)
]

Ui = Annotated[
    str,
    option(
        "Its UI's address, for links; that of run.ui in the values file, else of the host.",
        "SPECTRAQLORA_KFP_UI",
        "URL",
        SERVER,
    ),
]
PodNamespace = Annotated[
    str,
    option(
        "Namespace of the runs' pods; that of --namespace, else kubeflow.",
        "SPECTRAQLORA_POD_NAMESPACE",
        "NAME",
        SERVER,
    ),
]


def pods_are_in(pod_namespace: str, namespace: str) -> str:
    """The namespace of the runs' pods: a profile's, or that of Kubeflow Pipelines itself."""
    return pod_namespace or namespace or "kubeflow"


def variables(command: Callable[..., None]) -> str:
    """The end of a command's help: which environment variables take the place of its options."""
    hints = get_type_hints(command, include_extras=True).values()
    given = [option.envvar for hint in hints for option in getattr(hint, "__metadata__", ()) if option.envvar]
    names = [name if isinstance(name, str) else name[0] for name in given]
    return (
        f"A bearer token goes into {TOKEN}, a session cookie into {COOKIE}. "
        f"Options are environment variables too, each after {PREFIX}: "
        f"{', '.join(name.removeprefix(PREFIX) for name in names)}."
    )


def launched_settings(
    pipeline: str, config: Path | None, assignments: list[str] | None, look: bool, preset: str = "default"
) -> tuple[Settings, dict[str, Any]]:
    """Settings that a cluster can run, and the pipeline's arguments from them.

    Args:
        pipeline: ablation or retraining.
        config: YAML file of settings.
        assignments: `section.key=value`.
        look: whether the arguments say what base, data and table hold now.
        preset: settings under those of the file.
    """
    from spectraqlora_pipelines.dags.catalogue import cluster_arguments

    settings = load_settings(config, {}, assignments, preset)
    return settings, cluster_arguments(pipeline, settings, _warn if look else None)


def run_again(pipeline: str, settings: Settings, arguments: dict[str, Any]) -> Collection[str] | None:
    """The steps that take nothing from an earlier run since nobody knows what they read; None where there are none."""
    from spectraqlora_pipelines.dags.catalogue import checked, readers_without_digest

    return readers_without_digest(checked(pipeline), settings, arguments) or None


def _warn(text: str) -> None:
    errors.print(f"warning: {text}", highlight=False)


def connect(host: str, namespace: str, token_file: str, ca_file: str) -> Kubeflow:
    """The server at `host`; token and cookie come from the environment."""
    from spectraqlora_pipelines.cluster.client import Connection, Kubeflow

    token, cookie = (os.environ.get(name, "").strip() for name in (TOKEN, COOKIE))
    return Kubeflow(Connection(host, namespace, token, token_file, cookie, ca_file))


def placed_values(values: Path | None, package: Path | None) -> ClusterValues | None:
    """The values file, where one is given and nothing was compiled with another before."""
    if values is None:
        return None
    from spectraqlora_pipelines.cluster.values import read_values

    if package is not None:
        raise InputError("--values", values, "nothing with --package, which was compiled with its own values")
    placed = read_values(values)
    for text in placed.short_windows():
        _warn(text)
    return placed


def launch(
    settings: Settings,
    values: ClusterValues | None,
    experiment: str,
    service_account: str,
    pipeline_root: str,
) -> Launch:
    """How runs are launched: options first, then the values file, then settings."""
    from spectraqlora_pipelines.cluster.client import Launch

    run = values.run if values else None
    return Launch(
        experiment or (run.experiment if run else "") or settings.tracking.experiment,
        service_account or (run.service_account if run else None) or None,
        pipeline_root or (run.pipeline_root if run else "") or None,
    )


def upload(
    server: Kubeflow,
    settings: Settings,
    pipeline: str,
    name: str,
    package: Path | None,
    values: ClusterValues | None,
    uncached: Collection[str] | None = None,
) -> Uploaded:
    """Upload `package`, or the pipeline compiled now, unless the server has it.

    Args:
        server: where to.
        settings: what is compiled.
        pipeline: ablation or retraining.
        name: of the pipeline on the server; empty is the pipeline's own.
        package: taken instead, where it is given.
        values: how the steps run there.
        uncached: steps that take nothing from an earlier run; all where it is empty.
    """
    from spectraqlora_pipelines.dags.catalogue import checked, compile_dag, describe, without_cache

    kind = checked(pipeline)
    if package is not None and not package.is_file():
        raise InputError("--package", package, "a pipeline YAML written by `spectraqlora compile`")
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch) / f"{kind}.yaml"
        if package is None:
            compile_dag(compiled, kind, settings, values)
        else:
            shutil.copyfile(package, compiled)
        if uncached is not None:
            without_cache(compiled, uncached)
        uploaded = server.upload(compiled, name or f"spectraqlora-{pipeline}", describe(kind))
    line(f"Pipeline version {uploaded.name} {'uploaded' if uploaded.new else 'is there already'}")
    return uploaded
