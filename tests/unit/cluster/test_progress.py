"""A run's tree from its workflow's nodes, and from KFP's own record of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from spectraqlora_pipelines.cluster import progress
from spectraqlora_pipelines.cluster.progress import (
    Step,
    duration,
    nodes_of_tasks,
    nodes_of_workflow,
    own_error,
    steps_of,
)
from spectraqlora_pipelines.dags.catalogue import Dag

from tests.argo import BEGIN, Workflow
from tests.unit.compiled_dag import compiled_from

RECORDED = {
    "dag-diamond-xfww2.A": 1488588956,
    "dag-diamond-xfww2.A(0)": 990947287,
    "dag-diamond-82q7s.D": 1226654358,
    "dag-diamond-88trp.A": 2052796420,
    "dag-optional-inputartifacts.condition": 3418089753,
}
"""Ids that Argo gave to nodes, from workflows in its own repository."""


@cache
def pipeline(kind: Dag = "ablation") -> dict[str, Any]:
    return compiled_from(kind, {"methods": "hybrid,qlora", "rounds": 2}).document


def failing() -> Workflow:
    """A run whose training of hybrid failed in its second attempt while that of qlora runs."""
    run = Workflow(pipeline(), "5f0c6f0e-3d5f-4c5e-9d3b-2d0b0c1d9a7e")
    run.group("exit-handler-1", "Running")
    for name in ("quantize-load", "prepare-data", "snr-analyze"):
        run.step(f"exit-handler-1.{name}", "Succeeded", cached=True)
    run.step("exit-handler-1.measure-base", "Succeeded")
    for method in ("hybrid", "qlora"):
        run.group(f"exit-handler-1.branch-{method}", "Running")
        run.step(f"exit-handler-1.branch-{method}.select-layers", "Succeeded")
    run.step(
        "exit-handler-1.branch-hybrid.train",
        "Failed",
        ("Failed", "Error (exit code 1)"),
        ("Failed", "OOMKilled (exit code 137)"),
    )
    run.step("exit-handler-1.branch-qlora.train", "Running", ("Running", ""))
    return run


def states(tree: Step) -> dict[str, str]:
    return {step.label: step.state for step in tree.leaves()}


@pytest.mark.parametrize(("name", "number"), RECORDED.items())
def test_a_nodes_id_is_argos(name: str, number: int) -> None:
    assert progress._fnv32a(name) == number


def test_every_step_has_its_state_in_its_place() -> None:
    run = failing()
    tree = steps_of(pipeline(), nodes_of_workflow(run.object()), run.name)
    assert states(tree) == {
        "quantize-load": "cached", "prepare-data": "cached", "snr-analyze": "cached", "measure-base": "done",
        "select-layers (hybrid)": "done", "train (hybrid, round 1)": "failed",
        "re-evaluate (hybrid, round 1)": "waiting", "train (hybrid, round 2)": "waiting",
        "re-evaluate (hybrid, round 2)": "waiting",
        "select-layers (qlora)": "done", "train (qlora, round 1)": "running", "re-evaluate (qlora, round 1)": "waiting",
        "compare": "waiting", "merge-export": "waiting", "register": "waiting", "promote": "waiting",
        "close-runs": "waiting",
    }  # fmt: skip
    failed = next(step for step in tree.leaves() if step.state == "failed")
    assert (failed.step, failed.method, failed.attempts) == ("train", "hybrid", 2)
    assert failed.message == "OOMKilled (exit code 137)"
    (handler,) = [part for part in tree.parts if not part.step]
    assert [part.label for part in handler.parts if not part.step] == ["branch: hybrid", "branch: qlora"]


def test_steps_stand_in_the_order_in_which_they_run_and_the_exit_task_last() -> None:
    tree = steps_of(pipeline(), {}, "none")
    labels = [step.label for step in tree.leaves()]
    assert labels[0] == "quantize-load" and labels[-5:] == [
        "compare",
        "merge-export",
        "register",
        "promote",
        "close-runs",
    ]
    assert (
        labels.index("select-layers (hybrid)")
        < labels.index("train (hybrid, round 1)")
        < labels.index("compare")
    )


def test_kfps_own_record_gives_the_same_states_without_reasons() -> None:
    run = failing()
    details = [
        SimpleNamespace(
            display_name=task["display_name"],
            state=task["state"],
            start_time=datetime.fromisoformat(task["start_time"]),
            end_time=datetime.fromisoformat(task["end_time"]),
            child_tasks=[SimpleNamespace(pod_name=child["pod_name"]) for child in task["child_tasks"]],
        )
        for task in run.task_details()
    ]
    workflow, nodes = nodes_of_tasks(pipeline(), details)
    assert workflow == run.name
    tree = steps_of(pipeline(), nodes, workflow)
    whole = steps_of(pipeline(), nodes_of_workflow(run.object()), run.name)
    assert states(tree) == states(whole)
    for mine, theirs in zip(tree.leaves(), whole.leaves(), strict=True):
        assert (mine.started, mine.finished) == (theirs.started, theirs.finished), mine.label


def test_what_has_not_begun_when_a_run_ends_never_will() -> None:
    run = failing()
    tree = steps_of(pipeline(), nodes_of_workflow(run.object()), run.name, ended=True)
    assert states(tree)["train (qlora, round 1)"] == "stopped"
    assert states(tree)["compare"] == "skipped" and "waiting" not in states(tree).values()


def test_a_condition_that_does_not_hold_skips_what_is_in_it() -> None:
    run = Workflow(pipeline("retraining"), "run")
    run.group("exit-handler-1", "Succeeded")
    run.step("exit-handler-1.detect-changes", "Succeeded")
    run.end("Succeeded")
    tree = steps_of(pipeline("retraining"), nodes_of_workflow(run.object()), run.name, ended=True)
    found = states(tree)
    assert found.pop("detect-changes") == "done" and set(found.values()) == {"skipped"}


def test_an_exit_task_is_found_below_its_hook() -> None:
    run = failing()
    hook = f"{run.name}.root.exit-handler-1.onExit"
    run.add(hook, "Succeeded", "DAG", after=f"{run.name}.root.exit-handler-1")
    run.add(f"{hook}.close-runs", "Succeeded", "DAG", after=hook)
    tree = steps_of(pipeline(), nodes_of_workflow(run.object()), run.name)
    assert states(tree)["close-runs"] == "done"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59, "59s"), (61, "1m01s"), (3 * 3600 + 5 * 60, "3h05m"), (90000, "25h00m")],
)
def test_a_duration_is_short(seconds: int, shown: str) -> None:
    step = Step("x", "x", "", "done", BEGIN, BEGIN + timedelta(seconds=seconds))
    assert duration(step, datetime.now(UTC)) == shown
    running = Step("x", "x", "", "running", BEGIN)
    assert duration(running, BEGIN + timedelta(seconds=seconds)) == shown
    assert duration(Step("x", "x", "", "waiting"), BEGIN) == ""


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("scoring\nerror: data.source: 's3://b/x': expected an object\nI1126 launcher failed\n", "error: data.source: 's3://b/x': expected an object"),
        ("Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\nF1126 launcher.go: exit 1", "torch.OutOfMemoryError: CUDA out of memory"),
        ("KeyError: 'x'\nDuring handling\nValueError: y", "ValueError: y"),
        ("all well", ""),
    ],
)  # fmt: skip
def test_a_steps_own_error_is_its_last_word(log: str, line: str) -> None:
    assert own_error(log) == line
