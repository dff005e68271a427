"""Data files and folders: what is read, and what is refused before a run."""

import json
from pathlib import Path

import pytest
from spectraqlora.data.sources import check_source, load_source
from spectraqlora.errors import InputError
from spectraqlora.places import data_place
from spectraqlora.settings import DataSettings

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)]


def jsonl(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_kind_of_file_has_the_same_rows(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame(ROWS)
    jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        place = data_place(str(tmp_path / f"rows.{suffix}"))
        check_source(place, DataSettings())
        assert list(load_source(place, DataSettings())) == ROWS, suffix


def test_a_folder_has_the_rows_of_its_files_of_one_kind(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS[:3])
    jsonl(tmp_path / "b.jsonl", ROWS[3:])
    (tmp_path / "README.md").write_text("no data")
    place = data_place(str(tmp_path))
    assert list(load_source(place, DataSettings())) == ROWS
    (tmp_path / "c.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(InputError, match="files of one kind"):
        check_source(place, DataSettings())


def test_bad_sources_are_refused_with_one_line(tmp_path: Path) -> None:
    good = [{"text": "a"}] * 3
    (tmp_path / "folder").mkdir()
    cases = {
        "missing": (str(tmp_path / "none.jsonl"), {}, "existing file"),
        "empty": (jsonl(tmp_path / "e.jsonl", []), {}, "empty"),
        "columns": (jsonl(tmp_path / "c.jsonl", [{"a": "1"}]), {}, "known layout"),
        "kind": (jsonl(tmp_path / "x.txt", good), {}, "one of .jsonl"),
        "fraction": (jsonl(tmp_path / "f.jsonl", good), {"eval_fraction": 0.01}, "eval_fraction"),
        "no files": (str(tmp_path / "folder"), {}, "a folder with .jsonl"),
    }
    (tmp_path / "n.csv").write_text("question,answer\n")
    cases["no rows"] = (str(tmp_path / "n.csv"), {}, "it has none")
    (tmp_path / "p.parquet").write_text("no parquet")
    cases["parquet"] = (str(tmp_path / "p.parquet"), {}, "readable Parquet")
    (tmp_path / "o.json").write_text('{"text": "a"}')
    cases["object"] = (str(tmp_path / "o.json"), {}, "JSON list")
    (tmp_path / "l.jsonl").write_bytes(b'{"text": "\xff"}\n')
    cases["latin"] = (str(tmp_path / "l.jsonl"), {}, "UTF-8")
    for name, (source, extra, words) in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            check_source(data_place(source), DataSettings(**extra))
        assert "\n" not in str(caught.value), name


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(InputError, match="line 2"):
        check_source(data_place(str(tmp_path / "b.jsonl")), DataSettings())


def test_files_of_different_columns_are_refused_when_they_are_loaded(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS)
    jsonl(tmp_path / "b.jsonl", [{**row, "more": "x"} for row in ROWS])
    with pytest.raises(InputError, match="rows of one shape") as caught:
        load_source(data_place(str(tmp_path)), DataSettings())
    assert "\n" not in str(caught.value)
