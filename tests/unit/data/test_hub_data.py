"""Data sets on the hub: only what is read is fetched, and a look before a run fetches nothing whole."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import Hub

SCRIPT = """
import sys
from spectraqlora.data.checks import check_source
from spectraqlora.data.sources import open_source
from spectraqlora.errors import InputError
from spectraqlora.places import data_place
from spectraqlora.settings import DataSettings
settings = DataSettings(**eval(sys.argv[3]))
place = data_place(sys.argv[2])
try:
    if sys.argv[1] == "check":
        print("::", check_source(place, settings))
    else:
        source = open_source(place, settings)
        print("::", {split: [record["text"] for _, record, _ in source.records(settings, split)] for split in source.splits})
except InputError as error:
    print("::", error)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


def ask(hub: Hub, home: Path, what: str, name: str, settings: str = "{}", **more: str) -> str:
    """What a process of its own says, whose hub client reads its variables anew."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what, name, settings],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **hub.environment(home), **more},
    )
    assert done.returncode == 0, done.stderr
    return next(line.removeprefix(":: ") for line in done.stdout.splitlines() if line.startswith("::"))


def publish(hub: Hub, folder: Path, columns: list[str]) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({name: [f"{name} {i}" for i in range(5000)] for name in columns}), out)
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(out.getvalue())
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(out.getvalue())
    (folder / "pictures.bin").write_bytes(b"not data")
    (folder / "hard.jsonl").write_text(json.dumps({"text": "hard"}))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: test\n    path: data/test-*\n- config_name: hard\n  data_files: hard.jsonl\n---\n"
    )
    hub.publish("datasets", "owner/rows", folder)


def test_only_the_files_that_are_read_are_fetched_and_offline_they_are_there(
    hub: Hub, tmp_path: Path
) -> None:
    publish(hub, tmp_path / "rows", ["text"])
    assert "one of the subsets of owner/rows: easy, hard" in ask(hub, tmp_path / "home", "read", "owner/rows")
    said = ask(hub, tmp_path / "home", "read", "owner/rows", "{'subset': 'hard'}")
    assert said == str({"train": ["hard"]})
    assert {name.partition("/")[2] for name in hub.fetched} == {"README.md", "hard.jsonl"}
    assert ask(hub, tmp_path / "home", "read", "owner/rows", "{'subset': 'hard'}", HF_HUB_OFFLINE="1") == said
    easy = ask(hub, tmp_path / "home", "read", "owner/rows", "{'subset': 'easy'}")
    assert easy.startswith("{'train': ['text 0',") and "'test': ['text 0'," in easy
    assert not any("pictures" in name for name in hub.fetched)


def test_a_look_at_columns_before_a_run_keeps_no_copy(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "rows", ["Question", "Answer"])
    said = ask(hub, tmp_path / "home", "check", "owner/rows", "{'subset': 'easy'}")
    assert "data.columns={prompt: Question, completion: Answer}" in said
    columns = "{'subset': 'easy', 'columns': {'prompt': 'Question', 'completion': 'Answer'}}"
    assert ask(hub, tmp_path / "home", "check", "owner/rows", columns) == "[]"
    assert not list((tmp_path / "home").rglob("*.parquet"))
    assert ask(hub, tmp_path / "home", "check", "owner/rows", columns, HF_HUB_OFFLINE="1") == "[]"
