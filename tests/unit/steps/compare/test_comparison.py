"""Compare: the winner, the leaderboard and the report, from artifacts alone."""

import json
from pathlib import Path

import pandas as pd
import pytest
from spectraqlora.artifacts import Evaluation, ModelOutline, PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.runtime import command_line
from spectraqlora.settings import TrackingSettings
from spectraqlora.snr.table import COLUMNS, write_table
from spectraqlora.steps.compare.comparison import Inputs, compare
from spectraqlora.tracking.results import log_results, results_logged
from spectraqlora.tracking.runs import Tracker

from tests.unit.results import evaluation

LOSSES = {"qlora": [3.0, 2.0, 1.0], "hybrid": [2.0, 1.0, 0.5]}


@pytest.fixture
def inputs(outline: Path, prepared: Path, tmp_path: Path) -> Inputs:
    """Two branches of the made-up model of two layers; outline and rows are those of a real one."""
    rows = [dict.fromkeys(COLUMNS, 1.0) for _ in range(2)]
    for layer, row in enumerate(rows):
        name = f"model.layers.{layer}.mlp.up_proj"
        row.update(module=name, layer=layer, type="mlp.up_proj", source="original")
    write_table(pd.DataFrame(rows), tmp_path / "table")
    for method, losses in LOSSES.items():
        evaluation(method, losses, 100).write(tmp_path / method)
        (tmp_path / f"{method}-adapter").mkdir()
        (tmp_path / f"{method}-adapter" / "adapter_model.safetensors").write_text(method)
    return Inputs(
        outline, prepared, tmp_path / "table",
        evaluations={method: tmp_path / method for method in LOSSES},
        adapters={method: tmp_path / f"{method}-adapter" for method in LOSSES},
    )  # fmt: skip


def test_the_report_is_one_html_file_made_from_the_inputs_alone(inputs: Inputs, tmp_path: Path) -> None:
    result = compare(inputs, tmp_path / "board", tmp_path / "winner", tmp_path / "out" / "report")
    page = (tmp_path / "out" / "report").read_text()
    assert page.startswith("<!doctype html>")
    assert all(method in page for method in LOSSES)
    assert ModelOutline.read(inputs.outline).base_digest in page
    assert result.winner == "hybrid" and [e.method for e in result.best_first] == ["hybrid", "qlora"]
    board = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert board["order"] == ["hybrid", "qlora"]
    # Gaps 1, 1 and 0.5: mean 5/6, standard error 1/6, t = 5 with two degrees of freedom.
    assert board["against_best"]["qlora"] == {
        "difference": pytest.approx(5 / 6), "stderr": pytest.approx(1 / 6), "p_value": pytest.approx(0.0377, abs=1e-4),
        "tied": False,
    }  # fmt: skip
    assert board["against_best"]["hybrid"]["tied"]
    assert Evaluation.read(tmp_path / "winner").method == "hybrid"
    assert (tmp_path / "winner" / "adapter" / "adapter_model.safetensors").read_text() == "hybrid"
    assert len(list((tmp_path / "board" / "plots").glob("*.svg"))) >= 4


def test_the_step_writes_the_report_where_an_earlier_attempt_left_one(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("half a page")
    branches: list[str] = []
    for method in LOSSES:
        branches += [f"--{method}", str(inputs.evaluations[method])]
        branches += [f"--{method}-adapter", str(inputs.adapters[method])]
    command_line.run(
        "compare",
        [
            *("--tracking-settings", json.dumps({"uri": f"sqlite:///{tmp_path}/mlflow.db"})),
            *("--outline", str(inputs.outline), "--rows", str(inputs.rows), "--table", str(inputs.table)),
            *("--leaderboard", str(tmp_path / "board"), "--winner", str(tmp_path / "winner")),
            *("--report", str(tmp_path / "report.html"), *branches),
        ],
    )
    assert "hybrid" in (tmp_path / "report.html").read_text()


def test_results_that_cached_steps_did_not_send_come_from_the_leaderboard_alone(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another pipeline run took train, re-evaluate and compare from the cache: its register step sends all of it."""
    compare(inputs, tmp_path / "board", tmp_path / "winner", tmp_path / "report")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    settings = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = [
        Tracker(settings, f"0b1f2c3d-0000-4000-8000-00000000000{number}", "register") for number in (1, 2)
    ]
    for tracker in runs:
        assert not results_logged(tracker)
        log_results(tracker, tmp_path / "board", inputs.rows)
        log_results(tracker, tmp_path / "board", inputs.rows)
        assert results_logged(tracker)
    assert runs[0].pipeline_run() != runs[1].pipeline_run()

    tracker = runs[1]
    parent = tracker.client.get_run(tracker.pipeline_run())
    assert parent.data.tags["kfp.run_id"] == runs[1].run_key and parent.data.tags["winner"] == "hybrid"
    assert parent.data.metrics == {"qlora_eval_loss": 2.0, "hybrid_eval_loss": pytest.approx(3.5 / 3)}
    kept = {file.path for file in tracker.client.list_artifacts(parent.info.run_id)}
    assert kept == {"leaderboard.json", "plots", "snr"}
    branch = tracker.client.get_run(tracker.branch_run("qlora"))
    assert branch.info.status == "FINISHED"
    assert branch.data.params["train.max_steps"] == "2" and branch.data.params["seed"] == "7"
    assert branch.data.metrics["perplexity"] == 7.4
    curve = tracker.client.get_metric_history(branch.info.run_id, "train_loss")
    assert sorted((point.step, point.value) for point in curve) == [(1, 3.0), (2, 2.0)]
    (data,) = branch.inputs.dataset_inputs
    assert data.dataset.digest == PreparedRows.read(inputs.rows).digest[:36]
    kept = {file.path for file in tracker.client.list_artifacts(branch.info.run_id)}
    assert kept == {"evaluation", "round-1"}


def test_a_branch_in_the_place_of_another_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    swapped = Inputs(
        inputs.outline, inputs.rows, inputs.table,
        evaluations={"sgm": inputs.evaluations["hybrid"]}, adapters={"sgm": inputs.adapters["hybrid"]},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"^sgm: .*expected the evaluation of sgm; it is that of hybrid"):
        compare(swapped, tmp_path / "board", tmp_path / "winner", tmp_path / "report")


def test_a_winner_without_adapter_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    without = Inputs(inputs.outline, inputs.rows, inputs.table, inputs.evaluations, {})
    with pytest.raises(InputError, match=r"^hybrid_adapter: "):
        compare(without, tmp_path / "board", tmp_path / "winner", tmp_path / "report")
