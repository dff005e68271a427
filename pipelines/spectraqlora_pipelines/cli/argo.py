"""What compile, submit and schedule do with `--target argo`: the same DAG on Argo Workflows alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter, ValidationError
from spectraqlora.errors import InputError
from spectraqlora.settings import Settings, digest

from spectraqlora_pipelines.cli.kubeflow import launched_settings, option
from spectraqlora_pipelines.cli.screen import errors, line

if TYPE_CHECKING:
    from spectraqlora_pipelines.cluster.argo_client import Argo
    from spectraqlora_pipelines.cluster.values import ClusterValues

ARGO = "argo"
Target = Annotated[str, option("kubeflow, or argo: Argo Workflows alone.", "SPECTRAQLORA_TARGET", "NAME")]


def for_argo(target: str) -> bool:
    """Whether runs go to Argo Workflows and not to Kubeflow Pipelines."""
    if target not in ("kubeflow", ARGO):
        raise InputError("--target", target, f"kubeflow or {ARGO}")
    return target == ARGO


def read_for_argo(values: Path | None) -> ClusterValues:
    """The values file, or what holds without one; what Argo has no use for is told."""
    from spectraqlora_pipelines.cluster.argo_pods import not_argos
    from spectraqlora_pipelines.cluster.values import ClusterValues, read_values

    placed = read_values(values) if values else ClusterValues()
    for text in [*not_argos(placed), *placed.short_windows()]:
        errors.print(f"warning: {text}", markup=False, highlight=False)
    return placed


@dataclass(frozen=True)
class Wanted:
    """What is to run on Argo Workflows, as the options name it.

    Args:
        pipeline: ablation or retraining.
        settings: of the run.
        arguments: of the pipeline, from the settings.
        template: the WorkflowTemplate.
        values: what it was made with.
    """

    pipeline: str
    settings: Settings
    arguments: dict[str, Any]
    template: dict[str, Any]
    values: ClusterValues

    @property
    def template_name(self) -> str:
        """Name of the WorkflowTemplate."""
        return str(self.template["metadata"]["name"])


def wanted(
    pipeline: str,
    config: Path | None,
    assignments: list[str] | None,
    preset: str,
    values: Path | None,
    package: Path | None,
    name: str,
    service_account: str,
) -> Wanted:
    """Settings, arguments and WorkflowTemplate from the options.

    Args:
        pipeline: ablation or retraining.
        config: YAML file of settings.
        assignments: `section.key=value`.
        preset: settings under those of the file.
        values: file that says how the steps run.
        package: a compiled WorkflowTemplate, taken instead.
        name: of the WorkflowTemplate; empty is `spectraqlora-PIPELINE`, or the package's own.
        service_account: of the steps, in place of that of the values.
    """
    from spectraqlora_pipelines.dags.argo import read_template, template_for
    from spectraqlora_pipelines.dags.catalogue import checked

    if package is not None and values is not None:
        raise InputError("--values", values, "nothing with --package, which was compiled with its own values")
    kind = checked(pipeline)
    # No step is taken from an earlier run, so what the addresses hold now does not matter.
    settings, arguments = launched_settings(pipeline, config, assignments, look=False, preset=preset)
    placed = read_for_argo(values)
    template = read_template(package) if package else template_for(kind, settings, placed)
    if name:
        template["metadata"]["name"] = name
    if service_account:
        for part in (template["spec"], template["spec"]["artifactGC"]):
            part["serviceAccountName"] = service_account
    return Wanted(pipeline, settings, arguments, template, placed)


def submit_to_argo(argo: Argo, run: Wanted, name: str, upload_only: bool) -> str:
    """Apply the WorkflowTemplate and start a run; its workflow's name, empty where none is started."""
    from spectraqlora_pipelines.dags.argo_runs import workflow

    label = name or f"{run.pipeline}-{digest(run.settings)[:8]}"
    _check_label("--name", label)
    done = argo.apply(run.template)
    line(f"WorkflowTemplate {run.template_name} {done} in namespace {argo.namespace}")
    if upload_only:
        return ""
    started = argo.create(workflow(run.template, label, run.arguments))
    line(f"Run {label}: workflow {started}")
    return started


def schedule_on_argo(
    argo: Argo, run: Wanted, name: str, cron: str, every: str, paused: bool, owner: str
) -> None:
    """Create the CronWorkflow of that name and its WorkflowTemplate, or change them.

    Args:
        argo: where to.
        run: what each run does.
        name: of the schedule.
        cron: a cron line, or empty.
        every: an interval such as 6h, or empty.
        paused: whether it starts nothing.
        owner: who keeps it; its schedules under other names are deleted.
    """
    from spectraqlora_pipelines.cluster.cron import argo_schedule
    from spectraqlora_pipelines.dags.argo_runs import cron_workflow

    _check_label("NAME", name)
    when = argo_schedule(cron, every)
    changed = argo.apply(run.template) == "changed"
    document = cron_workflow(name, run.template_name, run.arguments, when, run.values.argo, paused, owner)
    done = argo.apply(document)
    said = "changed" if changed and done == "unchanged" else done
    line(f"Schedule {name} {said} in namespace {argo.namespace}: {when} ({run.values.argo.timezone})")
    if owner:
        delete_of(argo, owner, keep=name)


def delete_of(argo: Argo, owner: str, keep: str = "") -> int:
    """Delete an owner's schedules but the one to keep; how many there were."""
    names = [known for known in argo.schedules_of(owner) if known != keep]
    for name in names:
        argo.change(name, "delete")
        line(f"Schedule {name} deleted: {owner} keeps it no more")
    return len(names)


def _check_label(option: str, name: str) -> None:
    from spectraqlora_pipelines.cluster.fields import LabelValue

    try:
        TypeAdapter(LabelValue).validate_python(name)
    except ValidationError:
        raise InputError(option, name, "for Argo Workflows at most 63 letters, digits, - _ .") from None
