"""The compiled DAG, and the whole of it run through the command line on a tiny model."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from spectraqlora.files import folder_digest
from spectraqlora.places import base_digest

from tests.hub import Hub

METHODS = ("qlora", "hybrid", "alors", "sgm", "qlora_half")
ROOT = Path(__file__).resolve().parents[2]
# The command line, whose steps are handed their inputs as a real KFP does it.
CLI = [sys.executable, str(ROOT / "tests" / "kfp_form.py")]


def spectraqlora(*arguments: str, timeout: float = 560) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "ablation.yaml"
    probe = (
        "import sys; from pathlib import Path; from spectraqlora_pipelines.dags.ablation import ablation_pipeline; "
        "from spectraqlora_pipelines.dags.catalogue import write_yaml; "
        f"write_yaml(ablation_pipeline({METHODS!r}, 1), Path({str(path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", probe], check=True)
    return path


def test_compiling_needs_no_torch_and_the_checked_in_yaml_is_current(compiled: Path) -> None:
    def lines(path: Path) -> list[str]:
        # A patch release of KFP changes its own version's line and nothing else.
        return [line for line in path.read_text().splitlines() if not line.startswith("sdkVersion:")]

    assert lines(ROOT / "pipelines" / "ablation.yaml") == lines(compiled), "run spectraqlora compile"
    again = compiled.with_name("retraining.yaml")
    assert spectraqlora("compile", "--pipeline", "retraining", "--output", str(again)).returncode == 0
    assert lines(ROOT / "pipelines" / "retraining.yaml") == lines(again), (
        "run spectraqlora compile --pipeline retraining"
    )


def test_the_dag_has_a_branch_per_method_with_its_steps_and_retries_on_every_task(compiled: Path) -> None:
    spec = next(yaml.safe_load_all(compiled.read_text()))
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    branches = {t["componentRef"]["name"] for t in tasks.values() if "branch" in t["componentRef"]["name"]}
    assert branches == {f"comp-branch-{m.replace('_', '-')}" for m in METHODS}
    assert {
        "quantize-load",
        "prepare-data",
        "snr-analyze",
        "measure-base",
        "compare",
        "merge-export",
        "register",
        "promote",
    } <= tasks.keys()
    inner = [t for b in branches for t in spec["components"][b]["dag"]["tasks"].values()]
    names = [t["taskInfo"]["name"] for t in inner]
    for method in METHODS:
        for step in ("select-layers", "train", "re-evaluate"):
            assert any(n.startswith(step) and f"({method}" in n for n in names)
    steps = [t for t in (*tasks.values(), *inner) if not t["componentRef"]["name"].startswith("comp-branch")]
    assert len(steps) == 8 + 3 * len(METHODS)
    assert all(t["retryPolicy"]["maxRetryCount"] >= 1 for t in steps)
    images = {e["container"]["image"] for e in spec["deploymentSpec"]["executors"].values()}
    assert len(images) == 7
    for executor in spec["deploymentSpec"]["executors"].values():
        assert "pip install" not in str(executor["container"].get("command", ""))


def test_retraining_asks_first_and_does_the_rest_only_where_something_changed(compiled: Path) -> None:
    spec = next(yaml.safe_load_all((ROOT / "pipelines" / "retraining.yaml").read_text()))
    root = spec["root"]["dag"]["tasks"]
    assert set(root) == {"exit-handler-1", "close-runs"}
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert set(tasks) == {"detect-changes", "condition-2"}
    assert "!= 'unchanged'" in tasks["condition-2"]["triggerPolicy"]["condition"]
    inner = spec["components"]["comp-condition-2"]["dag"]["tasks"]
    assert {"quantize-load", "branch-hybrid", "merge-export", "register", "promote"} <= inner.keys()
    for task in (tasks["detect-changes"], inner["register"], inner["promote"], root["close-runs"]):
        assert not task["cachingOptions"], "what looks at the registry, or changes it, is never cached"


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    workdir = tmp_path_factory.mktemp("run") / "work"
    # Where the hub's copies and those of s3:// addresses are.
    base = tmp_path_factory.mktemp("home") / ".cache" / "tiny"
    shutil.copytree(tiny_model, base)
    arguments = [
        "run", "--base-model", str(base), "--data", str(tiny_rows), "--workdir", str(workdir),
        "--rounds", "2", "--max-steps", "8", "--set", "select.rank=8", "--set", "select.rank_high=8",
        "--set", "select.rank_low=4", "--set", "evaluate.accuracy_rows=4", "--set", "evaluate.max_new_tokens=4",
    ]  # fmt: skip
    done = spectraqlora(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return arguments


def _workdir(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--workdir") + 1])


def test_the_summary_has_every_method_and_the_winners_numbers(finished: list[str]) -> None:
    summary = json.loads((_workdir(finished) / "summary.json").read_text())
    assert set(summary["methods"]) == set(METHODS)
    for entry in summary["methods"].values():
        assert entry["eval_loss"] < summary["base"]["eval_loss"]
        assert entry["trainable_parameters"] > 0 and entry["train_tokens_per_second"] > 0
    # A map that never moves is trained in one round, with the steps of both.
    assert {name: len(e["rounds"]) for name, e in summary["methods"].items()} == {
        "qlora": 1, "hybrid": 2, "alors": 2, "sgm": 1, "qlora_half": 1,
    }  # fmt: skip
    counts = {name: e["trainable_parameters"] for name, e in summary["methods"].items()}
    assert counts["hybrid"] < counts["qlora"]
    assert counts["sgm"] <= counts["hybrid"]
    assert all(e["rounds"][-1]["changes"] == [] for e in summary["methods"].values())
    assert summary["winner"] in METHODS
    assert summary["registered"] == {"name": "spectraqlora", "version": 1}


def test_the_digests_of_a_run_are_those_of_its_files(finished: list[str], tiny_model: Path) -> None:
    summary = json.loads((_workdir(finished) / "summary.json").read_text())
    assert summary["base"]["digest"] == folder_digest(tiny_model)
    of_no_files = hashlib.sha256(b"").hexdigest()
    documents = [path for path in _workdir(finished).rglob("*") if path.suffix in (".json", ".html")]
    assert documents and not [path for path in documents if of_no_files in path.read_text()]


def base_measured(workdir: Path) -> tuple[int, list[str]]:
    """How often a run scored the base, and the methods for which it measured the base's gradients, each time."""
    log = (workdir / "run.log").read_text()
    scored = re.findall("^ *scoring the base model on .*$", log, re.M)
    return len(scored), re.findall("^ *measuring the base model's gradients, once for (.*)$", log, re.M)


def test_all_branches_share_one_measurement_of_the_base(finished: list[str]) -> None:
    workdir = _workdir(finished)
    assert base_measured(workdir) == (1, ["hybrid, alors, sgm, qlora_half"])
    again = re.findall("^ *measuring the task's gradients with .*$", (workdir / "run.log").read_text(), re.M)
    assert len(again) == 2, "of hybrid and alors after round 1, for whose adapters a round follows"
    outputs = json.loads((workdir / "outputs.json").read_text())["steps"]
    nobodys = {
        step for step, artifacts in outputs.items()
        if "next_adapter" in artifacts and (workdir / artifacts["next_adapter"] / "none.txt").exists()
    }  # fmt: skip
    assert nobodys == {
        "re-evaluate (qlora, round 1)", "re-evaluate (hybrid, round 2)", "re-evaluate (alors, round 2)",
        "re-evaluate (sgm, round 1)", "re-evaluate (qlora_half, round 1)",
    }  # fmt: skip


@pytest.mark.soak
def test_one_branch_measures_the_base_once(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    done = spectraqlora(
        "run", "--base-model", str(tiny_model), "--data", str(tiny_rows), "--workdir", str(tmp_path / "work"),
        "--methods", "hybrid", "--max-steps", "2", "--set", "evaluate.accuracy_rows=0", "--set", "select.rank=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert base_measured(tmp_path / "work") == (1, ["hybrid"])
    shown = (tmp_path / "work" / "report.html").read_bytes()
    record = json.loads((tmp_path / "work" / "outputs.json").read_text())["steps"]
    assert (tmp_path / "work" / record["compare"]["report"]).read_bytes() == shown, "the page that KFP shows"


def test_methods_saw_the_same_number_of_tokens(finished: list[str]) -> None:
    summary = json.loads((_workdir(finished) / "summary.json").read_text())
    tokens = {e["train_tokens"] for e in summary["methods"].values()}
    assert max(tokens) - min(tokens) <= 0.05 * max(tokens)


def test_the_export_loads_without_this_project(finished: list[str], tiny_model: Path) -> None:
    workdir = _workdir(finished)
    probe = f"""
import sys
sys.modules["spectraqlora"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.arange(3, 20)[None]
merged = AutoModelForCausalLM.from_pretrained({str(workdir / "merged")!r})
base = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r})
plain = base(ids).logits
tuned = PeftModel.from_pretrained(base, {str(workdir / "adapter")!r})(ids).logits
assert not torch.allclose(plain, tuned, atol=1e-3)
if {json.loads((workdir / "summary.json").read_text())["merged_into"]!r} == "original":
    torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-3, atol=1e-3)
AutoTokenizer.from_pretrained({str(workdir / "merged")!r})
"""
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=workdir)
    assert "eval loss" in (workdir / "merged" / "README.md").read_text()


def test_mlflow_has_one_run_and_a_nested_run_per_branch(finished: list[str]) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{_workdir(finished)}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("spectraqlora")
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    nested = {r.data.tags["spectraqlora.branch"] for r in runs} - {"pipeline"}
    assert len(runs) == 1 + len(METHODS) and len(parents) == 1 and nested == set(METHODS)
    qlora = next(r for r in runs if r.data.tags["spectraqlora.branch"] == "qlora")
    assert qlora.data.params["train.max_steps"] == "8"
    assert len(client.get_metric_history(qlora.info.run_id, "train_loss")) > 4
    version = client.get_model_version_by_alias("spectraqlora", "champion")
    parent = parents[0].info.run_id
    assert version.run_id == parent and version.tags["promotion.decision"] == "promoted"
    for tag in ("merged_digest", "base_digest", "data_digest", "eval_digest", "spectraqlora_version"):
        assert version.tags[tag]
    folders = {file.path for file in client.list_artifacts(parent)}
    assert {"plots", "snr", "eval_rows", "adapter", "leaderboard.json"} <= folders
    assert any(name.startswith("system/") for name in qlora.data.metrics)
    (dataset,) = qlora.inputs.dataset_inputs
    assert dataset.dataset.digest == qlora.data.tags["data_digest"][:36]


def test_the_report_is_one_page_without_outside_references(finished: list[str]) -> None:
    page = (_workdir(finished) / "report.html").read_text()
    assert page.count("<svg") >= 4
    for words in ("Leaderboard", "Signal-to-noise", "Cost", *METHODS):
        assert words in page
    for reference in ('src="http', 'href="http', "<script", "url(http"):
        assert reference not in page


def test_running_again_reuses_every_finished_step(finished: list[str]) -> None:
    workdir = _workdir(finished)
    before = json.loads((workdir / "summary.json").read_text())
    trained = [p for p in workdir.rglob("training.json")]
    assert spectraqlora(*finished).returncode == 0
    assert [p for p in workdir.rglob("training.json")] == trained
    after = json.loads((workdir / "summary.json").read_text())
    # The gate alone is asked anew.
    assert before.pop("promotion")["decision"] == "promoted"
    assert after.pop("promotion")["decision"] == "is champion"
    assert after == before


def test_one_method_less_in_a_workdir_that_was_moved_reuses_what_the_other_did(
    finished: list[str], tmp_path: Path
) -> None:
    moved = shutil.copytree(_workdir(finished), tmp_path / "moved")
    done = spectraqlora(*finished, "--workdir", str(moved), "--methods", "qlora")
    assert done.returncode == 0, done.stdout + done.stderr
    reused = re.findall(r"^\[\d+/\d+\] (.*) \(reused\)$", done.stdout, re.M)
    assert set(reused) == {
        "quantize-load", "prepare-data", "snr-analyze", "measure-base", "select-layers (qlora)",
        "train (qlora, round 1)", "re-evaluate (qlora, round 1)",
    }  # fmt: skip
    assert "compare is the first step that runs again: alors is left out" in done.stdout
    assert list(json.loads((moved / "summary.json").read_text())["methods"]) == ["qlora"]
    again = spectraqlora(*finished, "--workdir", str(moved), "--fresh", "--data", "none.jsonl")
    assert again.returncode == 2 and (moved / "artifacts" / ".steps").exists(), "bad input changes nothing"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "magic"], "methods"),
        (["--set", "select.percent=101"], "select.percent"),
        (["--set", "select.rank=65"], "select.rank"),
        (["--set", "nonsense"], "section.key=value"),
        (["--data", "none.jsonl"], "data.source"),
        (["--base-model", "./none"], "model.base_model"),
        (["--base-model", "a/b/none"], "an existing folder; a hub id is"),
        (["--base-model", "gpt2"], "reachable hub model"),
        (["--base-model", "s3://bucket//x"], "model.base_model"),
        (["--data", "a/b/none"], "an existing file or folder; a hub id is"),
        (["--snr-table", "none.parquet"], "snr.table"),
        (["--config", "none.yaml"], "--config"),
        (["--pipeline", "magic"], "--pipeline"),
        (["--set", "promote.metric=bleu"], "promote.metric"),
        (["--set", "promote.guard_data=none.txt"], "promote.guard_data"),
        (["--set", "tracking.uri=http://127.0.0.1:9"], "no answer: tracking.uri"),
        (["--set", "tracking.uri=http://me:secret@127.0.0.1:9"], "MLFLOW_TRACKING_USERNAME"),
        (["--network", "host"], "--network"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], words: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    good = ["--base-model", str(tiny_model), "--data", str(tiny_rows), "--workdir", str(tmp_path / "w")]
    refused = spectraqlora("run", *good, *arguments)
    away = words.startswith("no answer: ")
    assert refused.returncode == (75 if away else 2), refused.stdout + refused.stderr
    assert refused.stderr.startswith("error: no answer: ") == away
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert words in refused.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.e2e
def test_one_hub_name_is_the_base_and_the_data_of_a_run(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "work"
    with Hub() as hub:
        base = hub.publish("models", "legacy/tiny", tiny_model)
        data = hub.publish("datasets", "legacy/tiny", tiny_rows.parent)
        done = subprocess.run(
            [
                *CLI, "run", "--base-model", "tiny", "--data", "tiny", "--workdir", str(workdir),
                "--methods", "qlora", "--max-steps", "2", "--set", "evaluate.accuracy_rows=0",
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, **hub.environment(tmp_path / "home")},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        weights = [name for name in hub.fetched if name.endswith(".safetensors")]
        assert weights == [f"{base}/model.safetensors"], "fetched once, by its commit"
    assert json.loads((workdir / "run.json").read_text())["contents"] == {"base_model": base, "data": data}
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["base"]["model"], summary["data"]["source"]) == ("tiny", "tiny")
    assert summary["base"]["digest"] == base_digest(tiny_model)


@pytest.mark.soak
def test_a_given_table_takes_the_place_of_the_scan(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "snr.json"
    assert spectraqlora("snr", str(tiny_model), "--spectrum-json", str(path)).returncode == 0
    table = json.loads(path.read_text())
    for name, row in table.items():
        row["snr"] = 9.0 if ".layers.2." in name else 1.0
    path.write_text(json.dumps(table))
    workdir = tmp_path / "work"
    done = spectraqlora(
        "run", "--base-model", str(tiny_model), "--data", str(tiny_rows), "--workdir", str(workdir),
        "--snr-table", str(path), "--methods", "hybrid", "--rounds", "1", "--max-steps", "2",
        "--set", "select.signal=spectrum", "--set", "select.percent=25", "--set", "select.rank=4",
        "--set", "evaluate.accuracy_rows=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (selected,) = workdir.rglob("selected.txt")
    assert base_measured(workdir) == (1, []), "nothing is calibrated where no method needs it"
    assert len(chosen := selected.read_text().split()) == 7 and all(".layers.2." in name for name in chosen)
