"""submit and schedule against a server that holds every request against KFP's own API definition."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from spectraqlora import __version__
from spectraqlora.errors import InputError
from spectraqlora_pipelines.cli import app
from typer.testing import CliRunner, Result

from tests.kfp_server import KfpServer

SETTINGS = """
model: {base_model: Qwen/Qwen3-0.6B}
data: {source: s3://bucket/rows.jsonl}
train: {max_steps: 7}
tracking: {uri: "http://mlflow:5000", experiment: nightly}
"""
Command = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running
    assert running.problems == []


@pytest.fixture
def command(server: KfpServer, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, **environment: str) -> Result:
        variables = {"SPECTRAQLORA_KFP_HOST": server.endpoint, "SPECTRAQLORA_CONFIG": str(config)}
        return CliRunner().invoke(app.app, list(arguments), env={**variables, **environment})

    return run


def refusal(result: Result) -> str:
    assert isinstance(result.exception, InputError), (result.output, result.exception)
    text = str(result.exception)
    assert "\n" not in text
    return text


def test_submit_uploads_a_version_once_and_starts_runs_with_the_settings_files_arguments(
    server: KfpServer, command: Command
) -> None:
    first = command("submit", "--set", "train.max_steps=9")
    assert first.exit_code == 0, first.output
    assert command("submit").exit_code == 0
    (pipeline,) = server.state.pipelines.values()
    (version,) = server.state.versions.values()
    assert pipeline["display_name"] == "spectraqlora-ablation"
    assert version["display_name"].startswith(f"{__version__}-") and version["display_name"] in first.output
    runs = list(server.state.runs.values())
    assert [run["runtime_config"]["parameters"]["train"]["max_steps"] for run in runs] == [9, 7]
    given = runs[1]["runtime_config"]["parameters"]
    assert given["base_model"] == "Qwen/Qwen3-0.6B" and given["source"] == "s3://bucket/rows.jsonl"
    assert "run_key" not in given, "the run's id is its pods' label, and in no cache key"
    assert runs[0]["run_id"] in first.output
    (experiment,) = server.state.experiments.values()
    assert experiment["display_name"] == "nightly"


def test_checkpoints_are_closer_on_a_cluster_unless_the_settings_say_otherwise(
    server: KfpServer, command: Command
) -> None:
    for assignments in ([], ["--set", "checkpoint.keep=3"], ["--set", "checkpoint.every_minutes=10"]):
        assert command("submit", *assignments).exit_code == 0
    given = [run["runtime_config"]["parameters"]["checkpoint"] for run in server.state.runs.values()]
    assert [part["every_minutes"] for part in given] == [3.0, 3.0, 10.0]


def test_the_printed_link_is_the_uis(server: KfpServer, command: Command, tmp_path: Path) -> None:
    assert f"{server.endpoint}/#/runs/details/" in command("submit").output
    (tmp_path / "values.yaml").write_text("run: {ui: https://ui.example/pipeline/}")
    by_file = command("submit", "--values", str(tmp_path / "values.yaml"))
    assert "https://ui.example/pipeline/#/runs/details/" in by_file.output
    given = command("submit", "--values", str(tmp_path / "values.yaml"), "--ui", "https://other.example")
    assert "https://other.example/#/runs/details/" in given.output


def test_a_retry_window_that_is_too_short_is_told_at_once(
    server: KfpServer, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "values.yaml").write_text("steps: {train: {retries: {max_backoff: 10m}}}")
    for arguments in (["submit"], ["schedule", "create", "x", "--every", "1d"]):
        done = command(*arguments, "--values", str(tmp_path / "values.yaml"))
        assert "warning: steps.train.retries.max_backoff: 10m: an attempt may take 7d" in done.stderr


def test_nothing_after_the_sign_is_the_empty_text(server: KfpServer, command: Command) -> None:
    done = command(
        "submit", "--set", "checkpoint.destination=s3://bucket/c", "--set", "checkpoint.destination="
    )
    assert done.exit_code == 0, (done.output, done.exception)
    (run,) = server.state.runs.values()
    assert run["runtime_config"]["parameters"]["checkpoint"]["destination"] == ""


def test_another_dag_is_another_version_of_the_same_pipeline(server: KfpServer, command: Command) -> None:
    assert command("submit", "--upload-only").exit_code == 0
    assert command("submit", "--upload-only", "--set", "rounds=2").exit_code == 0
    names = {version["display_name"] for version in server.state.versions.values()}
    assert len(server.state.pipelines) == 1 and len(names) == 2 and not server.state.runs


def test_a_compiled_package_goes_up_as_it_is(server: KfpServer, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    assert command("compile", "--pipeline", "retraining", "--output", str(path)).exit_code == 0
    done = command(
        "submit", "--pipeline", "retraining",
        SPECTRAQLORA_PIPELINE_PACKAGE=str(path), SPECTRAQLORA_KFP_SERVICE_ACCOUNT="trainer",
        SPECTRAQLORA_PIPELINE_ROOT="s3://bucket/root",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (run,) = server.state.runs.values()
    assert run["service_account"] == "trainer"
    assert run["runtime_config"]["pipeline_root"] == "s3://bucket/root"


def test_a_schedule_is_one_recurring_run_whatever_often_it_is_created(
    server: KfpServer, command: Command
) -> None:
    for number in range(3):
        assert command("schedule", "create", f"other-{number}", "--every", "1d").exit_code == 0
    made = command("schedule", "create", "nightly", "--cron", "0 3 * * 1")
    assert made.exit_code == 0 and "created" in made.output and "0 0 3 * * 1" in made.output, made.output
    again = command("schedule", "create", "nightly", "--cron", "0 3 * * 1")
    assert "unchanged" in again.output
    (entry,) = [r for r in server.state.recurring.values() if r["display_name"] == "nightly"]
    assert entry["no_catchup"] is True and entry["max_concurrency"] == "1"
    assert entry["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1" and entry["mode"] == "ENABLE"
    assert entry["runtime_config"]["parameters"]["data"]["split_by"] == "content"
    changed = command("schedule", "create", "nightly", "--every", "6h")
    assert "updated" in changed.output
    (entry,) = [r for r in server.state.recurring.values() if r["display_name"] == "nightly"]
    assert entry["trigger"]["periodic_schedule"]["interval_second"] == "21600"
    listed = command("schedule", "list").output
    for words in ("nightly", "every 21600 s", "active", "other-2"):
        assert words in listed


def test_pause_resume_and_delete(server: KfpServer, command: Command) -> None:
    assert command("schedule", "create", "nightly", "--every", "6h").exit_code == 0

    def modes() -> list[str]:
        return [run["mode"] for run in server.state.recurring.values()]

    assert command("schedule", "pause", "nightly").exit_code == 0 and modes() == ["DISABLE"]
    assert "paused" in command("schedule", "list").output
    assert command("schedule", "create", "nightly", "--every", "7h").exit_code == 0
    assert modes() == ["DISABLE"], "an update does not wake a paused schedule"
    assert command("schedule", "resume", "nightly").exit_code == 0 and modes() == ["ENABLE"]
    assert "deleted" in command("schedule", "delete", "nightly").output and modes() == []
    assert "was not there" in command("schedule", "delete", "nightly").output
    assert "there is none" in refusal(command("schedule", "pause", "nightly"))


def test_an_owner_keeps_one_schedule_whatever_its_name_was(server: KfpServer, command: Command) -> None:
    def names() -> list[str]:
        return sorted(run["display_name"] for run in server.state.recurring.values())

    create = ("schedule", "create")
    assert command(*create, "by-hand", "--every", "1d").exit_code == 0
    for number in range(3):
        assert command(*create, f"theirs-{number}", "--every", "1d", "--owner", f"t/{number}").exit_code == 0
    assert command(*create, "nightly", "--every", "1d", "--owner", "team/tuning").exit_code == 0
    unchanged = command(*create, "nightly", "--every", "1d", "--owner", "team/tuning")
    assert "unchanged" in unchanged.output and "deleted" not in unchanged.output
    renamed = command(*create, "weekly", "--every", "7d", "--owner", "team/tuning")
    assert "Schedule nightly deleted: team/tuning keeps it no more" in renamed.output
    assert names() == ["by-hand", "theirs-0", "theirs-1", "theirs-2", "weekly"]

    assert "updated" in command(*create, "weekly", "--every", "8d").output
    taken = command(*create, "weekly", "--every", "8d", "--owner", "other/tuning")
    assert "kept by team/tuning" in refusal(taken), "changed by hand it stays its owner's"
    adopted = command(*create, "by-hand", "--every", "1d", "--owner", "team/other")
    assert "updated" in adopted.output

    gone = command("schedule", "delete", "--owner", "team/tuning")
    assert gone.exit_code == 0 and names() == ["by-hand", "theirs-0", "theirs-1", "theirs-2"]
    assert (
        "keeps no schedule" in command("schedule", "delete", SPECTRAQLORA_SCHEDULE_OWNER="team/tuning").output
    )
    assert "either the name" in refusal(command("schedule", "delete"))
    assert "either the name" in refusal(command("schedule", "delete", "by-hand", "--owner", "team/other"))


def test_a_changed_or_deleted_schedule_leaves_its_run_under_way(server: KfpServer, command: Command) -> None:
    assert command("schedule", "create", "nightly", "--every", "6h").exit_code == 0
    first = server.start_scheduled("nightly")
    assert "updated" in command("schedule", "create", "nightly", "--every", "7h").output
    assert first["state"] == "RUNNING"
    second = server.start_scheduled("nightly")
    assert "deleted" in command("schedule", "delete", "nightly").output
    assert (first["state"], second["state"]) == ("RUNNING", "RUNNING")


def test_the_server_ends_the_runs_of_a_schedule_that_is_deleted_as_kubernetes_does_by_default(
    server: KfpServer, command: Command
) -> None:
    assert command("schedule", "create", "nightly", "--every", "6h").exit_code == 0
    started = server.start_scheduled("nightly")
    address = f"{server.endpoint}/apis/v2beta1/recurringruns/{started['recurring_run_id']}"
    urllib.request.urlopen(urllib.request.Request(address, method="DELETE"))
    assert started["state"] == "FAILED"


def test_the_environment_alone_is_enough(server: KfpServer, command: Command) -> None:
    done = command(
        "schedule",
        "create",
        SPECTRAQLORA_SCHEDULE="nightly",
        SPECTRAQLORA_CRON="@daily",
        SPECTRAQLORA_PAUSED="1",
    )
    assert done.exit_code == 0, done.output
    assert [run["mode"] for run in server.state.recurring.values()] == ["DISABLE"]


@pytest.mark.parametrize(
    ("variables", "token", "cookie"),
    [
        ({"SPECTRAQLORA_KFP_TOKEN": "abc"}, "abc", ""),
        ({"SPECTRAQLORA_KFP_COOKIE": "session=1"}, "", "session=1"),
    ],
)
def test_tokens_and_cookies_come_from_the_environment(
    variables: dict[str, str], token: str, cookie: str, server: KfpServer, command: Command
) -> None:
    server.token, server.cookie = token, cookie
    assert command("submit", **variables).exit_code == 0
    refused = command("submit", SPECTRAQLORA_KFP_NAMESPACE="x")
    assert "401" in refusal(refused) and "token or cookie" in refusal(refused)


def test_a_token_file_and_the_namespace_of_a_multi_user_installation(
    server: KfpServer, command: Command, tmp_path: Path
) -> None:
    server.token, server.multi_user = "fresh", True
    (tmp_path / "token").write_text("fresh")
    variables = {
        "SPECTRAQLORA_KFP_TOKEN_FILE": str(tmp_path / "token"),
        "SPECTRAQLORA_KFP_NAMESPACE": "team",
    }
    for _ in range(2):
        done = command("schedule", "create", "nightly", "--every", "1d", **variables)
        assert done.exit_code == 0, (done.output, done.exception)
    assert "unchanged" in done.output
    (experiment,) = server.state.experiments.values()
    (pipeline,) = server.state.pipelines.values()
    assert experiment["namespace"] == pipeline["namespace"] == "team"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "--set", "model.base_model=sample"], ["model.base_model", "hub id"]),
        (["submit", "--set", "data.source=./rows.jsonl"], ["data.source", "s3://"]),
        (["submit", "--set", "tracking.uri=sqlite:///x.db"], ["tracking.uri", "MLflow"]),
        (["submit", "--set", "promote.metric=bleu"], ["promote.metric", "bleu", "merged_eval_loss"]),
        (["submit", "--pipeline", "magic"], ["--pipeline", "magic"]),
        (["submit", "--package", "none.yaml"], ["--package", "none.yaml"]),
        (["submit", "--token-file", "none"], ["--token-file", "none"]),
        (["schedule", "create", "x"], ["--cron", "--every"]),
        (["schedule", "create", "x", "--cron", "0 3 * *"], ["--cron", "0 3 * *", "five fields"]),
        (["schedule", "create", "x", "--cron", "0 25 * * *"], ["--cron", "0-23", "hour"]),
        (["schedule", "create", "x", "--cron", "0 3 * * 7"], ["--cron", "0-6", "SUN-SAT"]),
        (["schedule", "create", "x", "--every", "soon"], ["--every", "soon"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_uploaded(
    arguments: list[str], words: list[str], server: KfpServer, command: Command
) -> None:
    said = refusal(command(*arguments))
    for word in words:
        assert word in said
    assert not [request for request in server.requests if request.startswith("POST")]


def test_a_host_that_does_not_answer_is_named(command: Command) -> None:
    said = refusal(command("submit", SPECTRAQLORA_KFP_HOST="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9" in said and "reachable" in said
    away = [
        sys.executable,
        "-m",
        "spectraqlora_pipelines.cli",
        "schedule",
        "list",
        "--host",
        "http://127.0.0.1:9",
    ]
    done = subprocess.run(away, capture_output=True, text=True, check=False)
    assert done.returncode == 75, "a job on a cluster is tried again"
    assert done.stderr.startswith("error: no answer: --host: 'http://127.0.0.1:9'")


def test_the_server_refuses_what_the_definition_does_not_know(server: KfpServer) -> None:
    def post(path: str, document: object) -> str:
        request = urllib.request.Request(
            f"{server.endpoint}{path}", json.dumps(document).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        return str(json.loads(caught.value.read())["message"])

    assert "not in the API" in post("/apis/v1beta1/runs", {})
    assert "not a field" in post("/apis/v2beta1/recurringruns", {"cron": "x"})
    assert "no bool" in post("/apis/v2beta1/recurringruns", {"no_catchup": "yes"})
    assert "not one of" in post("/apis/v2beta1/recurringruns", {"mode": "ON"})
    assert "no query parameter" in post("/apis/v2beta1/recurringruns?when=now", {})
    assert len(server.problems) == 5
    server.problems.clear()
