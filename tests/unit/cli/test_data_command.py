"""The command data: what a model would learn of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from spectraqlora.errors import InputError
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.cli.data_block import example_text
from typer.testing import CliRunner


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    written = [
        {"id": i, "prompt": f"who <b> is {i}?", "completion": "red" if i % 10 else ""} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return path


def test_it_shows_the_block_and_marks_what_is_learned_and_writes_the_same_as_a_page(
    rows: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = tmp_path / "out" / "page.html"
    given = ["data", str(rows), "--base-model", str(tiny_model), "--html", str(page)]
    done = CliRunner().invoke(app.app, given, catch_exceptions=False)
    assert done.exit_code == 0
    shown = " ".join(done.output.split())
    for words in (
        "layout prompt-completion",
        "read 40 rows",
        "dropped 4 no answer (first:",
        "columns unused id",
        "the limit is 128",
        "Answer:» red</s>«",
    ):
        assert words in shown, words
    written = page.read_text()
    for words in ("40 rows", "4 no answer (first:", "<mark> red&lt;/s&gt;</mark>", "who &lt;b&gt; is"):
        assert words in written, words
    assert "http://" not in written and "https://" not in written


def test_bad_data_is_its_one_line(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"Question": "q", "Answer": "a"}\n' * 9)
    given = ["data", str(tmp_path / "d.jsonl"), "--base-model", str(tiny_model)]
    with pytest.raises(InputError, match=r"data\.columns=\{prompt: Question, completion: Answer\}"):
        CliRunner().invoke(app.app, given, catch_exceptions=False)
    hinted = [*given, "--set", "data.columns={prompt: Question, completion: Answer}"]
    assert "all are equal" in " ".join(
        CliRunner().invoke(app.app, hinted, catch_exceptions=False).output.split()
    )


def test_the_learned_part_is_in_colour_where_there_are_colours() -> None:
    example = [("asked", False), ("said [red]", True)]
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as capture:
        console.print(example_text(example, colours=True))
    assert capture.get() == "asked\x1b[32msaid [red]\x1b[0m\n"
    assert example_text(example, colours=False).plain == "asked»said [red]«"
    assert len(example_text([("x" * 9999, False), ("y", True)], colours=True).plain) < 700
