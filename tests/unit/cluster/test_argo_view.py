"""Runs on Argo Workflows as `status` shows them, from workflows that Argo 4.0.5 kept: one done, one failed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from spectraqlora_pipelines.cluster.argo_view import argo_steps_of, run_of
from spectraqlora_pipelines.cluster.progress import Step
from spectraqlora_pipelines.cluster.view import reasons_of

RECORDED = json.loads(
    (Path(__file__).resolve().parents[1] / "recorded" / "argo-workflows.json").read_text(encoding="utf-8")
)
BRANCH = ("select-layers", "train", "re-evaluate")


def leaves(workflow: dict[str, Any]) -> dict[str, Step]:
    return {step.label: step for step in argo_steps_of(workflow).leaves()}


def test_a_run_that_went_well_is_done_in_every_step() -> None:
    tree = argo_steps_of(RECORDED["second"])
    assert run_of(RECORDED["second"]).state == "SUCCEEDED"
    assert [part.label for part in tree.parts] == [
        "quantize-load", "prepare-data", "measure-base", "snr-analyze", "branch-hybrid", "branch-qlora",
        "compare", "merge-export", "register", "promote", "close-runs",
    ]  # fmt: skip
    assert {(step.state, step.attempts) for step in tree.leaves()} == {("done", 1)}
    hybrid = tree.parts[4]
    assert [(part.step, part.method) for part in hybrid.parts] == [(step, "hybrid") for step in BRANCH]
    assert all(step.finished > step.started for step in tree.leaves() if step.started and step.finished)


def test_a_failed_run_names_the_step_its_attempts_and_why() -> None:
    workflow = RECORDED["first"]
    steps = leaves(workflow)
    assert run_of(workflow).state == "FAILED"
    failed = steps["quantize-load"]
    assert (failed.state, failed.attempts) == ("failed", 3)
    assert {step.state for label, step in steps.items() if label not in ("quantize-load", "close-runs")} == {
        "skipped"
    }
    assert steps["close-runs"].state == "done"
    reasons = reasons_of(argo_steps_of(workflow), [], None, "")
    assert reasons == {"quantize-load": failed.message} and "permission denied" in failed.message


def test_the_reason_is_the_newest_attempts_in_whatever_order_argo_keeps_them() -> None:
    workflow = copy.deepcopy(RECORDED["first"])
    said = {
        "0": "Pod ephemeral local storage usage exceeds the total limit of containers 600Ki. ",
        "1": "pod deleted",
        "2": "Pod was rejected: The node had condition: [DiskPressure]. ",
    }
    nodes = workflow["status"]["nodes"].values()
    for node in nodes:
        if node["name"].endswith(")"):
            node["message"] = said[node["name"][-2]]
    for order in (False, True):
        ordered = sorted(nodes, key=lambda node: str(node["name"]), reverse=order)
        workflow["status"]["nodes"] = {node["id"]: node for node in ordered}
        reasons = reasons_of(argo_steps_of(workflow), [], None, "")
        assert reasons["quantize-load"].startswith("its node ran out of memory or disk (Pod was rejected")


def test_a_run_under_way_waits_for_what_has_not_begun() -> None:
    workflow = copy.deepcopy(RECORDED["second"])
    status = workflow["status"]
    status["phase"] = "Running"
    begun = ("5m4pk", "all-steps", "quantize-load", "quantize-load(0)", "prepare-data", "prepare-data(0)")
    status["nodes"] = {key: node for key, node in status["nodes"].items() if node["name"].endswith(begun)}
    for node in status["nodes"].values():
        if "quantize-load" not in node["name"]:
            node["phase"] = "Running"
    steps = leaves(workflow)
    assert steps["quantize-load"].state == "done" and steps["prepare-data"].state == "running"
    assert {steps[label].state for label in steps if label not in ("quantize-load", "prepare-data")} == {
        "waiting"
    }


def test_a_run_that_argo_has_not_looked_at_yet_is_waiting() -> None:
    workflow = {"metadata": {"name": "w", "labels": {}}, "spec": {"workflowTemplateRef": {"name": "t"}}}
    assert run_of(workflow).state == "PENDING"
    assert argo_steps_of(workflow).state == "waiting"


def test_a_run_that_argo_cannot_begin_says_why() -> None:
    """As Argo 4.0.5 said it of a run whose template it had not seen yet."""
    said = 'workflowtemplates.argoproj.io "t" not found'
    status = {"phase": "Error", "message": said}
    workflow = {
        "metadata": {"name": "w", "labels": {}},
        "spec": {"workflowTemplateRef": {"name": "t"}},
        "status": status,
    }
    tree = argo_steps_of(workflow)
    assert run_of(workflow).state == "FAILED" and (tree.state, tree.message) == ("failed", said)
