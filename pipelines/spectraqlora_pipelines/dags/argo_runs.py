"""What starts a WorkflowTemplate: a Workflow once, a CronWorkflow on a schedule."""

from __future__ import annotations

from typing import Any

from spectraqlora_pipelines.cluster.argo_client import OWNER, RUN
from spectraqlora_pipelines.cluster.values import ArgoValues
from spectraqlora_pipelines.dags.argo import API, texts

_HISTORY = 3
"""Finished runs that a schedule keeps of each end; what goes takes its artifacts along."""


def workflow(template: dict[str, Any], name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A run of a WorkflowTemplate, which holds the template itself.

    By its name Argo would look it up in what its controller has seen so far: where that is a moment behind, a new
    template is not there, and a changed one is the old one.

    Args:
        template: the WorkflowTemplate.
        name: of the run, for people.
        arguments: of the pipeline; the others have the template's values.
    """
    spec = template["spec"]
    known = spec.get("arguments", {}).get("parameters", [])
    values = {entry["name"]: entry for entry in [*known, *texts(arguments)]}
    return {
        "apiVersion": API,
        "kind": "Workflow",
        "metadata": {"generateName": f"{template['metadata']['name']}-", "labels": {RUN: name}},
        "spec": {**spec, "arguments": {"parameters": list(values.values())}},
    }


def cron_workflow(
    name: str,
    template: str,
    arguments: dict[str, Any],
    when: str,
    values: ArgoValues,
    paused: bool = False,
    owner: str = "",
) -> dict[str, Any]:
    """A schedule of a WorkflowTemplate, whose runs never overlap.

    Args:
        name: of the schedule.
        template: name of the WorkflowTemplate.
        arguments: of the pipeline.
        when: a cron line, or `@every 6h`.
        values: its time zone.
        paused: whether it starts nothing.
        owner: who keeps it.
    """
    # Forbid is about the runs of this object alone; the mutex holds as well where it was deleted and made again.
    alone = {"synchronization": {"mutexes": [{"name": f"spectraqlora-{name}"}]}}
    return {
        "apiVersion": API,
        "kind": "CronWorkflow",
        "metadata": {"name": name, "annotations": {OWNER: owner}},
        "spec": {
            "schedules": [when],
            "timezone": values.timezone,
            "concurrencyPolicy": "Forbid",
            "suspend": paused,
            "successfulJobsHistoryLimit": _HISTORY,
            "failedJobsHistoryLimit": _HISTORY,
            "workflowMetadata": {"labels": {RUN: name}},
            "workflowSpec": {
                "workflowTemplateRef": {"name": template},
                "arguments": {"parameters": texts(arguments)},
                **alone,
            },
        },
    }
