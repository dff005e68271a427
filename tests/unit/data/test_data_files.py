"""Files of every kind: the rows are what is written there, and damage is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectraqlora.data.files import DataFile, read_rows, suffixes
from spectraqlora.errors import InputError

AS_WRITTEN = ["01023", "1.50", "NA", "true", "2024-01-03", "null", "1e5", " x ", "é"]


def file(name: str, content: bytes) -> DataFile:
    return DataFile(name, *suffixes(name), lambda: io.BytesIO(content))


def values(name: str, content: bytes, encoding: str = "utf-8") -> list[dict[str, Any]]:
    return [row for _, row in read_rows(file(name, content), encoding, {"prompt", "completion"})]


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def test_kinds_are_told_by_names_in_any_case() -> None:
    assert suffixes("D.JSONL") == (".jsonl", "")
    assert suffixes("a.b.CSV.Gz") == (".csv", ".gz")
    assert suffixes("x.parquet.zst") == ("", ".zst")
    assert suffixes("x.gz") == ("", ".gz")
    assert suffixes("x.pdf") == ("", "")


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_text_stays_as_it_is_written_in_every_kind(text: str) -> None:
    row = {"prompt": "q", "completion": text}
    line = json.dumps(row, ensure_ascii=False).encode()
    for name in ("d.jsonl", "d.ndjson", "d.json"):
        assert values(name, line + b"\n") == [row]
    assert values("d.json", b"[" + line + b",\n" + line + b"]") == [row, row]
    assert values("d.csv", f'prompt,completion\r\n"q","{text}"\r\n'.encode()) == [row]
    assert values("d.csv", f"prompt,completion\nq,{text}\n".encode()) == [row]
    assert values("d.tsv", f"prompt\tcompletion\nq\t{text}\n".encode()) == [row]
    table = pa.Table.from_pylist([row])
    parquet, stream, arrow = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table)
    assert values("d.parquet", parquet.getvalue()) == [row]
    assert values("d.arrow", stream.getvalue()) == values("d.arrow", arrow.getvalue()) == [row]


def test_json_numbers_keep_their_digits() -> None:
    row = values("d.jsonl", b'{"a": 1.50, "b": 10000000000000000000001, "c": 0.1e3, "d": -0}')[0]
    assert {key: str(value) for key, value in row.items()} == {
        "a": "1.50", "b": "10000000000000000000001", "c": "0.1e3", "d": "-0",
    }  # fmt: skip


def test_narrow_floats_of_parquet_are_short_again() -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"x": pa.array([0.1, None, 2.0], pa.float32())}), out)
    assert [row["x"] for row in values("d.parquet", out.getvalue())] == ["0.1", None, "2.0"]


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "txt", "md"])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstd), ("GZ", gzip.compress)],
)
def test_text_may_be_compressed_and_what_is_cut_short_is_refused(
    kind: str, suffix: str, compress: Any
) -> None:
    line = {"csv": b"prompt,completion\nq,r\n", "tsv": b"prompt\tcompletion\nq\tr\n"}.get(kind)
    content = line or b'{"prompt": "q", "completion": "r"}'
    packed = compress(content)
    assert values(f"d.{kind}.{suffix}", packed) == values(f"d.{kind}", content)
    assert values(f"d.{kind}.{suffix}", packed)
    for broken in (packed[:-6], b"no archive at all", bz2.compress(content)):
        with pytest.raises(InputError) as refused:
            values(f"d.{kind}.{suffix}", broken)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    row = {"prompt": "q é 漢", "completion": "r"}
    line = mark + json.dumps(row, ensure_ascii=False) + "\n"
    table = mark + f"prompt,completion\r\n{row['prompt']},r\r\n"
    for setting in ("utf-8", "cp1252"):
        assert values("d.jsonl", line.encode(encoding), setting) == [row]
        assert values("d.json", line.encode(encoding), setting) == [row]
        assert values("d.csv", table.encode(encoding), setting) == [row]


def test_another_encoding_is_named_with_its_line_and_the_setting_and_read_where_asked() -> None:
    content = "prompt,completion\r\nq,r\r\nq,café\r\n".encode("cp1252")
    with pytest.raises(InputError, match=r"d\.csv, line 3.*UTF-8.*data\.encoding=cp1252"):
        values("d.csv", content)
    assert values("d.csv", content, "cp1252")[1] == {"prompt": "q", "completion": "café"}
    with pytest.raises(InputError, match="line 1"):
        values("d.jsonl", '{"text": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match="UTF-16"):
        values("d.jsonl", '{"text": "é"}'.encode("utf-16")[:-1])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found_even_where_others_are_more_frequent_in_fields(delimiter: str) -> None:
    text = f'prompt{delimiter}completion\n"a, b; c, d | e\t"{delimiter}"1,5; 2|3"\n'
    assert values("d.csv", text.encode()) == [{"prompt": "a, b; c, d | e\t", "completion": "1,5; 2|3"}]


def test_excels_first_line_names_the_delimiter() -> None:
    assert values("d.csv", b"sep=;\r\nprompt;completion\r\nq;r\r\n") == [{"prompt": "q", "completion": "r"}]


def test_csv_fields_hold_line_breaks_quotes_and_much_text() -> None:
    long = "x" * 300_000
    content = f'prompt,completion\n"a\nb","say ""hi"""\n\n{long},r\n'.encode()
    assert values("d.csv", content) == [
        {"prompt": "a\nb", "completion": 'say "hi"'},
        {"prompt": long, "completion": "r"},
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"prompt,completion\nq,r,s\n", "row 1.*2 fields"),
        (b'prompt,completion\nq,r\nq,"r\n', "row 2.*CSV"),
        (b"prompt,prompt\nq,r\n", "different names"),
    ],
)
def test_csv_that_does_not_add_up_is_refused_by_row(content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        values("d.csv", content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.jsonl", b'{"text": "a"}\nnot json\n', "line 2.*'not json'"),
        ("d.jsonl", b'{"text": "a"}\n[1]\n', "line 2"),
        ("d.json", b'[{"text": "a"}, 3]', "row 2"),
        ("d.json", b'[{"text": "a"}', "cut short"),
        ("d.json", b'[{"text": "a"}] x', "nothing after it"),
        ("d.json", b'{"text": "a"} {"text"', "row 2"),
        ("d.parquet", b"no parquet", "Parquet"),
        ("d.arrow", b"no arrow file", "Arrow"),
    ],
)
def test_damage_is_named(name: str, content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        values(name, content)
    assert "\n" not in str(refused.value)


def test_json_documents_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "x" * length, "n": [{"a": "]"}]} for length in (0, 1, 50, 7, 300)]
    for part in (1, 7, 64):
        monkeypatch.setattr("spectraqlora.data.files._CHARACTERS", part)
        assert values("d.json", json.dumps(rows, indent=1).encode()) == rows
        assert values("d.json", "\n".join(json.dumps(row, indent=2) for row in rows).encode()) == rows
        assert values("d.json", b" [ ] \n") == []


def test_lines_are_numbered_as_an_editor_does() -> None:
    content = b'\n{"text": "a\\u2028b"}\n\n{"text": "c"}\r\n'
    assert [number for number, _ in read_rows(file("d.jsonl", content))] == [2, 4]


def test_text_is_parted_by_blank_lines_else_by_lines_and_markdown_is_a_document() -> None:
    prose = b"\xef\xbb\xbfone\ntwo\n\n\nthree\r\n\r\nfour"
    assert [row["text"] for row in values("d.txt", prose)] == ["one\ntwo", "three", "four"]
    assert [number for number, _ in read_rows(file("d.txt", prose))] == [1, 5, 7]
    assert [row["text"] for row in values("d.txt", b"\n\none\ntwo\n\n")] == ["one", "two"]
    assert [row["text"] for row in values("d.md", b"# A\n\nb\n")] == ["# A\n\nb\n"]
    assert values("d.md", b" \n") == values("d.txt", b"\n \n") == []


def test_damaged_parquet_of_real_rows_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"] * 1000}), out)
    with pytest.raises(InputError, match="Parquet"):
        values("d.parquet", out.getvalue()[:-20])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_as_it_was_written(texts: list[str]) -> None:
    rows = [{"prompt": "q", "completion": text} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    escaped = "".join(json.dumps(row) + "\r\n" for row in rows)
    assert values("d.jsonl", lines.encode()) == values("d.jsonl", escaped.encode()) == rows
    assert values("d.json", json.dumps(rows, indent=1, ensure_ascii=False).encode()) == rows
    for suffix, delimiter in (("csv", ","), ("csv", ";"), ("tsv", "\t")):
        table = io.StringIO(newline="")
        writer = csv.writer(table, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerow(["prompt", "completion"])
        writer.writerows([row["prompt"], row["completion"]] for row in rows)
        assert values(f"d.{suffix}", table.getvalue().encode()) == rows
        assert values(f"d.{suffix}", table.getvalue().encode("utf-16")) == rows


def test_a_list_is_read_whatever_it_is_called_or_wrapped_in() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "tools": [{"name": "f"}]}]
    for indent in (None, 2):
        listed = json.dumps(rows, indent=indent)
        wrapped = json.dumps({"version": "1.0", "data": rows}, indent=indent)
        for name in ("d.jsonl", "d.ndjson", "d.json"):
            assert values(name, f"\ufeff\n {listed}".encode()) == rows
        assert values("d.json", wrapped.encode()) == rows
    assert values("d.json", json.dumps(rows[1]).encode()) == rows[1:]
    with pytest.raises(InputError, match="row 1"):
        values("d.jsonl", b"[1]\n[2]\n")


def test_files_that_were_put_together_keep_their_marks_to_themselves() -> None:
    line = b'\xef\xbb\xbf{"text": "a"}\n'
    assert values("d.jsonl", line + line) == [{"text": "a"}] * 2


def test_quotes_of_tabs_are_text_where_they_do_not_add_up() -> None:
    plain = 'prompt\tcompletion\n"hi" she said\t"a" or "b\n\nq\t\n'
    assert values("d.tsv", plain.encode()) == [
        {"prompt": '"hi" she said', "completion": '"a" or "b'},
        {"prompt": "q", "completion": ""},
    ]
    assert values("d.tsv", b'prompt\tcompletion\n"a\tb"\t"c ""d"""\n') == [
        {"prompt": "a\tb", "completion": 'c "d"'}
    ]


def test_names_of_columns_have_no_white_space_around_them() -> None:
    assert values("d.csv", b"prompt, completion \nq,r\n") == [{"prompt": "q", "completion": "r"}]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        (
            "d.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "c"}',
            "line 2: 'prompt'",
        ),
        ("d.json", b'[{"messages": [{"role": "user", "role": "tool"}]}]', "row 1: 'role'"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(name: str, content: bytes, where: str) -> None:
    with pytest.raises(InputError, match=f"{name}, {where}: expected keys that are different"):
        values(name, content)


@pytest.mark.parametrize("name", ["d.txt", "d.csv", "d.jsonl", "d.md"])
def test_utf_16_without_its_mark_is_refused_with_the_setting_and_read_where_asked(name: str) -> None:
    text = "prompt,completion\nhello,world\n" if name == "d.csv" else '{"prompt": "hello"}\n'
    content = text.encode("utf-16-le")
    with pytest.raises(InputError, match=r"data\.encoding=utf-16-le"):
        values(name, content)
    assert "hello" in str(values(name, content, "utf-16-le"))


def test_fields_that_a_record_leaves_out_at_its_end_are_empty() -> None:
    content = b"prompt,completion,note\nq,a\nq\nq,a,n\n"
    assert [list(row.values()) for row in values("d.csv", content)] == [
        ["q", "a", ""],
        ["q", "", ""],
        ["q", "a", "n"],
    ]


def test_several_lists_in_one_object_are_splits_for_files_of_their_own() -> None:
    rows = [{"prompt": "q", "completion": "a"}]
    with pytest.raises(InputError, match=r"d\.json: 'train, test': .*a folder with train\.json, test\.json"):
        values("d.json", json.dumps({"train": rows, "test": rows}).encode())
    assert values("d.json", json.dumps({"prompt": rows, "completion": rows}).encode()) == [
        {"prompt": rows, "completion": rows}
    ]


def test_line_ends_of_old_macs_are_refused_in_words() -> None:
    with pytest.raises(
        InputError, match=r"row 1: 'new-line character.*' ?: expected a record of CSV; lines end"
    ):
        values("d.csv", b"prompt,completion\rq,a\rq,b\r")
