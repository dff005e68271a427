"""What submit says of base, data and SNR table as they are now: KFP's cache knows a step by its arguments alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.dags.catalogue import cluster_arguments
from typer.testing import CliRunner, Result

from tests.hub import Hub
from tests.kfp_server import KfpServer
from tests.s3 import BUCKET, Server, environment

Command = Callable[..., Result]
READERS = {"quantize-load", "prepare-data", "snr-analyze"}
DATA = f"s3://{BUCKET}/faq"
BASE = f"s3://{BUCKET}/base"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running
    assert running.problems == []


@pytest.fixture
def command(
    server: KfpServer, store: Server, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    for name, value in {**environment(store.endpoint), "HOME": str(tmp_path), "COLUMNS": "300"}.items():
        monkeypatch.setenv(name, value)

    def run(
        *arguments: str, base: str = BASE, data: str = DATA, table: str = "", pipeline: str = "ablation"
    ) -> Result:
        (tmp_path / "settings.json").write_text(
            json.dumps(
                {
                    "methods": "hybrid", "model": {"base_model": base}, "data": {"source": data},
                    "snr": {"table": table}, "tracking": {"uri": "http://mlflow:5000"},
                }
            )
        )  # fmt: skip
        given = [
            "--host",
            server.endpoint,
            "--config",
            str(tmp_path / "settings.json"),
            "--pipeline",
            pipeline,
        ]
        done = CliRunner().invoke(app.app, [*arguments, *given])
        assert done.exit_code == 0, (done.output, done.exception)
        return done

    return run


def put(store: Server, folder: Path, name: str, **files: str) -> None:
    """Replace what is at an address of this name."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / name / file.replace("_", ".")).write_text(text)
    store.put_plain(folder / name, name)


def arguments(server: KfpServer) -> list[dict[str, Any]]:
    runs = [*server.state.runs.values(), *server.state.recurring.values()]
    return [run["runtime_config"]["parameters"] for run in runs]


def uncached(server: KfpServer) -> set[str]:
    """Steps of the newest uploaded version that take nothing from an earlier run."""
    spec = list(server.state.versions.values())[-1]["pipeline_spec"]
    parts = [spec["root"], *spec["components"].values()]
    tasks = [task for part in parts for task in part.get("dag", {}).get("tasks", {}).values()]
    return {
        task["componentRef"]["name"].removeprefix("comp-")
        for task in tasks
        if "cachingOptions" in task and not task["cachingOptions"].get("enableCache")
    }


@pytest.mark.parametrize(
    ("name", "key"), [("faq", "source_content"), ("base", "base_content"), ("tables", "table_content")]
)
def test_what_was_replaced_in_place_is_another_run(
    name: str, key: str, command: Command, server: KfpServer, store: Server, tmp_path: Path
) -> None:
    put(store, tmp_path, "faq", rows_jsonl='{"prompt":"a","completion":"b"}\n')
    put(store, tmp_path, "base", config_json="{}")
    put(store, tmp_path, "tables", snr_json="{}")
    table = f"s3://{BUCKET}/tables/snr.json"
    command("submit", table=table)
    command("submit", table=table)
    file = {"faq": "rows_jsonl", "base": "config_json", "tables": "snr_json"}[name]
    put(store, tmp_path, name, **{file: '{"prompt":"c","completion":"d"}\n'})
    command("submit", table=table)
    first, same, changed = arguments(server)
    assert first == same and len(first[key]) == 64
    assert {k for k in first if first[k] != changed[k]} == {key}
    assert not uncached(server) & READERS and len(server.state.versions) == 1


def test_a_hub_id_is_the_commit_that_it_is_now(
    command: Command, server: KfpServer, hub: Hub, store: Server, tmp_path: Path
) -> None:
    put(store, tmp_path, "faq", rows_jsonl='{"prompt":"a","completion":"b"}\n')
    (tmp_path / "model").mkdir()
    commits = []
    for text in ("{}", '{"a": 1}'):
        (tmp_path / "model" / "config.json").write_text(text)
        commits.append(hub.publish("models", "me/model", tmp_path / "model"))
        command("submit", base="me/model")
    assert [given["base_content"] for given in arguments(server)] == commits


def test_what_is_not_seen_from_here_is_told_and_read_again_by_every_run(
    command: Command, server: KfpServer, store: Server, tmp_path: Path
) -> None:
    put(store, tmp_path, "faq", rows_jsonl='{"prompt":"a","completion":"b"}\n')
    done = command("submit", base="/models/base", table=f"s3://{BUCKET}/nothing.json")
    (given,) = arguments(server)
    assert "base_content" not in given and len(given["source_content"]) == 64
    assert uncached(server) & READERS == {"quantize-load", "snr-analyze"}
    lines = done.stderr.splitlines()
    assert any(line.startswith("warning: model.base_model: '/models/base': on a volume") for line in lines)
    assert any("nothing.json" in line and "not seen from here" in line for line in lines)


def test_without_the_cache_no_step_takes_anything_and_nothing_is_looked_at(
    command: Command, server: KfpServer
) -> None:
    done = command("submit", "--no-cache", data="s3://no-such-bucket-of-anyone/x")
    assert not done.stderr and "source_content" not in arguments(server)[0]
    assert READERS | {"train", "compare", "measure-base", "register"} <= uncached(server)


def test_a_package_loses_its_cache_on_the_way_and_stays_as_it_is(
    command: Command, server: KfpServer, tmp_path: Path
) -> None:
    path = tmp_path / "given.yaml"
    assert CliRunner().invoke(app.app, ["compile", "--output", str(path)]).exit_code == 0
    before = path.read_bytes()
    command("submit", "--no-cache", "--package", str(path))
    assert uncached(server) >= READERS and path.read_bytes() == before


def test_a_schedule_counts_what_is_there_when_its_runs_start(command: Command, server: KfpServer) -> None:
    command("schedule", "create", "a", "--every", "1d", pipeline="ablation")
    assert uncached(server) & READERS == {"quantize-load", "prepare-data"}
    command("schedule", "create", "r", "--every", "1d", pipeline="retraining")
    assert not uncached(server) & READERS and "detect-changes" in uncached(server)
    for given in arguments(server):
        assert not {"base_content", "source_content", "table_content"} & given.keys()


def test_retraining_digests_base_and_table_in_its_first_step_and_hands_them_on() -> None:
    from tests.unit.compiled_dag import compiled_from

    tasks = {task.step: task for task in compiled_from("retraining", {}).tasks()}
    assert tasks["quantize-load"].values["content"] == "detect-changes.base_digest"
    assert tasks["snr-analyze"].values["content"] == "detect-changes.table_digest"
    assert tasks["prepare-data"].values["content"] == "detect-changes.Output"
    assert tasks["detect-changes"].document["cachingOptions"] == {}
    assert tasks["register"].values["origin"].keys() == {"source_digest", "recipe_digest"}


def test_arguments_of_a_cluster_need_no_hub_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectraqlora.settings import parse

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    settings = parse(
        {
            "model": {"base_model": "org/base"},
            "data": {"source": "org/rows"},
            "tracking": {"uri": "http://m:1"},
        }
    )
    unseen: list[str] = []
    given = cluster_arguments("ablation", settings, unseen.append)
    assert "base_content" not in given and len(unseen) == 2
