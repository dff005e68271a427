"""Data sets on the hub: only what is read is fetched, and a look before a run fetches nothing whole."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import Hub

SCRIPT = """
import json, sys
from spectraqlora.data.sources import open_source
from spectraqlora.errors import InputError
from spectraqlora.places import data_place, data_places
from spectraqlora.settings import DataSettings
for what, given in json.loads(sys.argv[1]):
    settings, place = DataSettings(**given), data_place("owner/rows")
    try:
        if what == "check":
            from spectraqlora.data.checks import check_sources
            said = check_sources(data_places(settings) if settings.sources else [place], settings)
        elif what == "several":
            from spectraqlora.data.sources import open_sources
            from spectraqlora.places import joined_contents
            content = joined_contents([each.digest() for each in data_places(settings)])
            source = open_sources(settings, content)
            said = [content, {split: [file.source for file in files] for split, files in source.splits.items()}]
        else:
            source = open_source(place, settings)
            said = {
                split: [record["text"] for _, record, _ in source.records(settings, split)][:2]
                for split in source.splits
            }
    except InputError as error:
        said = str(error)
    print("::", json.dumps(said))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


def ask(hub: Hub, home: Path, *requests: tuple[str, dict[str, Any]], **more: str) -> list[Any]:
    """What a process of its own says, whose hub client reads its variables anew."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(requests)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **hub.environment(home), **more},
    )
    assert done.returncode == 0, done.stderr
    return [
        json.loads(line.removeprefix(":: ")) for line in done.stdout.splitlines() if line.startswith("::")
    ]


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
    unnamed, hard = ask(hub, tmp_path / "home", ("read", {}), ("read", {"subset": "hard"}))
    assert "one of the subsets of owner/rows: easy, hard" in unnamed
    assert hard == {"train": ["hard"]}
    assert {name.partition("/")[2] for name in hub.fetched} == {"README.md", "hard.jsonl"}
    (easy,) = ask(hub, tmp_path / "home", ("read", {"subset": "easy"}))
    assert easy == {"train": ["text 0", "text 1"], "test": ["text 0", "text 1"]}
    assert not any("pictures" in name for name in hub.fetched)
    again = ask(
        hub, tmp_path / "home", ("read", {"subset": "hard"}), ("read", {"subset": "easy"}), HF_HUB_OFFLINE="1"
    )
    assert again == [hard, easy]


def test_a_look_at_columns_before_a_run_keeps_no_copy(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "rows", ["Question", "Answer"])
    columns = {"prompt": "Question", "completion": "Answer"}
    unnamed, named = ask(
        hub,
        tmp_path / "home",
        ("check", {"subset": "easy"}),
        ("check", {"subset": "easy", "columns": columns}),
    )
    assert "data.columns={prompt: Question, completion: Answer}" in unnamed
    assert named == []
    assert not list((tmp_path / "home").rglob("*.parquet"))


def test_several_sources_bring_their_splits_each_at_its_own_commit(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "published", ["text"])
    here = tmp_path / "here.jsonl"
    here.write_text(json.dumps({"text": "here"}) + "\n")
    parts = [{"source": str(here)}, {"source": "owner/rows", "split": "test"}, {"source": "owner/rows"}]
    given = {"sources": parts, "subset": "easy"}
    said, several = ask(hub, tmp_path / "home", ("check", given), ("several", given))
    content, splits = several
    assert said == [] and len(content.split()) == 3
    commits = {name.partition("/")[0] for name in hub.fetched}
    assert set(content.split()[1:]) == commits
    # Rows of the second are trained on; those that the third brings for a test are a test.
    assert splits == {"train": [0, 1, 2], "test": [2]}
