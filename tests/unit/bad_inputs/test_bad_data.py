"""Data that cannot be learned from: each is refused in one line, before a run and by prepare-data alike."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spectraqlora.data.checks import check_sources
from spectraqlora.data.for_model import RowModel, row_model
from spectraqlora.places import data_place
from spectraqlora.settings import DataSettings, parse
from spectraqlora.steps.prepare_data.prepare import prepare_for

from tests.bad_inputs import check_refused, written

ROW = '{"question": "q %d", "answer": "a %d"}\n'
FINE = "".join(ROW % (i, i) for i in range(40))


def lines(*rows: object, times: int = 20) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows) * times


def chat(*messages: object) -> str:
    return lines({"messages": list(messages)})


def turn(role: object, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


TABLE = pa.table({"question": ["q"] * 30, "answer": ["a"] * 30})
DEEP = "[" * 100_000 + "]" * 100_000

FILES: list[tuple[str, str | bytes, str]] = [
    # Nothing in it.
    ("empty.jsonl", "", "empty"), ("blank.jsonl", "\n\n \n", "rows"), ("bom.jsonl", b"\xef\xbb\xbf", "rows"), ("empty.csv", "", "empty"),
    ("header.csv", "question,answer\n", "rows"), ("blank.csv", "\n\n\n", "rows|header"), ("empty.json", "", "empty"), ("none.json", "[]", "rows"),
    ("spaces.json", "  \n ", "rows"), ("empty.txt", "", "empty"), ("blank.txt", "\n\n\n", "rows"), ("empty.md", "", "empty"),
    ("empty.parquet", "", "empty"), ("no rows.parquet", parquet(TABLE.slice(0, 0)), "rows"), ("no rows.arrow", arrow(TABLE.slice(0, 0)), "rows"),
    ("empty.tsv", "", "empty"), ("header.tsv", "question\tanswer\n", "rows"), ("empty.gz.jsonl", b"", "empty"),
    # Damaged, or of another kind than its name says.
    ("cut.jsonl", FINE + '{"question": "x", \n', "line 41"), ("cut string.jsonl", FINE + '{"question": "x', "line 41"), ("list.jsonl", "[1, 2]\n[3]\n", "row 1|JSON"),
    ("numbers.jsonl", "1\n2\n", "line 1"), ("strings.jsonl", '"a"\n"b"\n', "line 1"), ("null.jsonl", "null\n", "line 1"), ("lists.jsonl", FINE + "[1]\n", "line 41"),
    ("deep.jsonl", '{"question":' + DEEP + ',"answer":"a"}\n' + FINE, "line 1"), ("deep.json", DEEP, "row 1|JSON"), ("open.json", "[", "cut short|JSON"),
    ("more.json", '[{"question": "q", "answer": "a"}] x', "nothing after"), ("inner.json", '[{"question": "q"}, 5]', "row 2"), ("bad.json", "[{]", "row 1"), ("text.json", "hello", "row 1"),
    ("comma.json", '[{"question": "q", "answer": "a"},', "cut short|row 2"), ("html.jsonl", "<html><body>404</body></html>\n", "line 1"), ("lfs.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "line 1"),
    ("lfs.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "parquet"), ("zip.jsonl", b"PK\x03\x04" + bytes(100), "another encoding|line 1"), ("html.csv", "<html>\n<body>\n</html>\n", "columns"),
    ("magic.parquet", b"PAR1" + bytes(100) + b"PAR1", "parquet"), ("cut.parquet", parquet(TABLE)[:-20], "parquet"), ("text.parquet", FINE, "parquet"), ("short.parquet", b"PAR1", "parquet"),
    ("text.arrow", FINE, "arrow"), ("cut.arrow", arrow(TABLE)[:60], "arrow"), ("bytes.arrow", bytes(64), "arrow|rows"), ("magic.arrow", b"ARROW1\0\0" + bytes(30), "arrow"),
    ("plain.jsonl.gz", FINE, "gz"), ("cut.jsonl.gz", gzip.compress(FINE.encode())[:-30], "gz"), ("damaged.jsonl.gz", gzip.compress(FINE.encode())[:20] + bytes(60), "gz"),
    ("plain.jsonl.xz", FINE, "xz"), ("cut.jsonl.xz", lzma.compress(FINE.encode())[:-30], "xz"), ("plain.csv.zst", "a,b\n", "zst"), ("head.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20), "zst"), ("gz.jsonl", gzip.compress(FINE.encode()), "another encoding"),
    # In another encoding.
    ("latin.jsonl", FINE.encode() + b'{"question": "caf\xe9", "answer": "a"}\n', "line 41"), ("latin.csv", b"question,answer\n" + b"caf\xe9,b\n" * 20, "line 2"), ("latin.txt", b"caf\xe9\n" * 20, "line 1"), ("latin.md", b"caf\xe9\n", "line 1"),
    ("utf16.jsonl", FINE.encode("utf-16-le"), "utf-16-le"), ("odd utf16.jsonl", FINE.encode("utf-16") + b"x", "UTF-16"), ("utf16 mark.csv", b"\xff\xfeq", "UTF-16"), ("utf32.jsonl", b"\xff\xfe\0\0" + b"abc", "UTF-32|UTF-16"),
    ("bytes.csv", bytes(range(256)), "encoding|text"), ("nul.jsonl", b"\0" * 100, "line 1"),
    # Tables that are none.
    ("ragged.csv", "question,answer\n" + "q,a\n" * 20 + "a,b,c,d,e\n", "row 21"), ("quote.csv", 'question,answer\n"q,a\n' * 3, "row|columns"), ("after quote.csv", 'question,answer\n' + 'q,a\n' * 9 + '"q"x,a\n', "row 10"), ("twice.csv", "question,question\nq,a\n", "different names"),
    ("ragged.tsv", "question\tanswer\n" + "q\ta\n" * 20 + "a\tb\tc\n", "row 21"), ("columns.csv", "foo,bar\n" + "a,b\n" * 20, "columns"), ("header only columns.csv", ",\n,\n", "rows|columns"),
    ("ints.parquet", parquet(pa.table({"question": [1] * 30, "answer": [[2]] * 30})), "answer|row 1|text"), ("blobs.parquet", parquet(pa.table({"question": [b"\xff"] * 30, "answer": ["a"] * 30})), "question|row 1|bytes"),
    ("structs.parquet", parquet(pa.table({"question": [{"a": 1}] * 30, "answer": ["a"] * 30})), "question|row 1"), ("times.parquet", parquet(pa.table({"question": pa.array([0] * 30, pa.timestamp("s")), "answer": ["a"] * 30})), "question|row 1"),
    # Columns of no layout, and values that are no text.
    ("unknown.jsonl", lines({"foo": 1}), "columns"), ("unknown text.jsonl", lines({"foo": "a", "bar": "b"}), "data.columns"), ("no columns.jsonl", lines({}), "columns"), ("one side.jsonl", lines({"answer": "a"}), "columns"), ("question only.jsonl", lines({"question": "a"}), "columns"),
    ("dict.json", '{"a": 1}', "columns|row"), ("all empty.jsonl", lines({"question": "", "answer": ""}), "rows to learn|no answer|empty"), ("no answers.jsonl", lines({"question": "q", "answer": ""}), "no answer|rows to learn"), ("nulls.jsonl", lines({"question": None, "answer": None}), "row|rows to learn"),
    ("objects.jsonl", lines({"question": {"a": 1}, "answer": [1]}), "question|answer"), ("booleans.jsonl", lines({"question": True, "answer": False}), "question|answer"), ("nan.jsonl", '{"question": NaN, "answer": Infinity}\n' * 20, "question|answer"),
    ("mixed.jsonl", FINE + lines({"question": {"a": 1}, "answer": "a"}), "row 41"), ("preference.jsonl", lines({"prompt": "p", "chosen": "a", "rejected": "b"}), "preference"), ("kto.jsonl", lines({"prompt": "p", "completion": "a", "label": True}), "preference|label"),
    ("images.jsonl", lines({"question": "q", "answer": "a", "images": ["x.png"]}), "images"), ("surrogate.jsonl", '{"question": "\\ud800", "answer": "a"}\n' * 20, "row|surrogate|text"), ("one row.jsonl", ROW % (1, 1), "data.|rows"), 
    ("two.jsonl", ROW % (1, 1) * 2, "rows|equal"), ("text number.jsonl", lines({"text": {"a": 1}}), "text"), ("text list.jsonl", lines({"text": ["a"]}), "text"), ("text empty.jsonl", lines({"text": ""}), "rows|empty|text"),
    # Conversations that are none.
    ("messages text.jsonl", lines({"messages": "hello"}), "messages"), ("messages numbers.jsonl", lines({"messages": [1, 2]}), "messages"), ("messages null.jsonl", lines({"messages": None}), "messages|rows"), ("messages empty.jsonl", lines({"messages": []}), "messages|rows|empty"),
    ("messages object.jsonl", lines({"messages": {"role": "user"}}), "messages"), ("no role.jsonl", chat({"content": "x"}), "role|messages"), ("no content.jsonl", chat({"role": "user"}, {"role": "assistant"}), "content|rows"),
    ("content number.jsonl", chat(turn("user", {"a": 5}), turn("assistant", [[6]])), "content"), ("content parts.jsonl", chat(turn("user", [{"type": "image_url"}]), turn("assistant", "y")), "image"), ("no assistant.jsonl", chat(turn("user", "x")), "assistant|rows"), ("empty assistant.jsonl", chat(turn("user", "x"), turn("assistant", "")), "rows|answer|empty"),
    ("weights.jsonl", chat(turn("user", "x"), turn("assistant", "y", weight=0)), "weight|rows"), ("weight text.jsonl", chat(turn("user", "x"), turn("assistant", "y", weight="much")), "weight"), ("calls.jsonl", chat(turn("user", "x"), turn("assistant", None, tool_calls="f")), "tool calls"), ("call parts.jsonl", chat(turn("user", "x"), turn("assistant", "", tool_calls=[5])), "tool calls"),
    ("tools.jsonl", lines({"messages": [turn("user", "x"), turn("assistant", "y")], "tools": 5}), "tools"), ("sharegpt.jsonl", lines({"conversations": [{"from": 5, "value": "x"}]}), "from|conversations"), ("sharegpt value.jsonl", lines({"conversations": [{"from": "human"}, {"from": "gpt"}]}), "value|conversations|content"), ("nested.jsonl", lines({"messages": [[turn("user", "x")]]}), "messages"),
    # Kinds that are not read.
    ("data.xlsx", b"PK\x03\x04", "jsonl"), ("data", FINE, "jsonl"), ("data.pkl", b"\x80\x04N.", "jsonl"), ("data.yaml", "a: 1\n", "jsonl"), ("data.parquet.gz", gzip.compress(parquet(TABLE)), "jsonl"), ("data.zip", b"PK\x05\x06" + bytes(18), "jsonl"), ("data.jsonl.bz2", b"BZh9", "jsonl"),
]  # fmt: skip

FOLDERS: list[tuple[str, dict[str, str | bytes], str]] = [
    ("empty", {}, "folder with"), ("hidden", {".a.jsonl": FINE}, "folder with"), ("readme", {"README.md": "# text\n"}, "folder with"), ("kinds", {"a.jsonl": FINE, "b.csv": "question,answer\nq,a\n"}, "one kind"),
    ("one empty", {"a.jsonl": FINE, "b.jsonl": ""}, "b.jsonl.*empty"), ("one damaged", {"a.jsonl": FINE, "b.jsonl": "{"}, "b.jsonl, line 1"), ("only test", {"test.jsonl": FINE}, "train"),
    ("only validation", {"validation.jsonl": FINE, "test.jsonl": FINE}, "train"), ("nothing below", {"sub/notes.docx": b"x"}, "folder with"),
    ("damaged parquet", {"train.parquet": b"PAR1"}, "parquet"), ("configs", {"a.jsonl": FINE, "b.jsonl": FINE, "README.md": "---\nconfigs:\n- config_name: x\n  data_files: a.jsonl\n- config_name: y\n  data_files: b.jsonl\n---\n"}, "data.subset.*x, y"),
    ("dot", {"..jsonl": FINE}, "folder with"),
]  # fmt: skip

SETTINGS: list[tuple[dict[str, object], str]] = [
    ({"columns": {"prompt": "nope", "completion": "answer"}}, "nope|data.columns"), ({"columns": {"prompt": "question"}}, "data.columns"), ({"columns": {"messages": "question"}}, "question|messages"), ({"split": "nope"}, "data.split"), ({"split": "train[:10]"}, "data.split"), ({"split": "a+b"}, "data.split"),
    ({"split": ""}, "data.split"), ({"subset": "nope"}, "data.subset"), ({"encoding": "utf-16"}, "UTF-16|encoding"), ({"encoding": "nope"}, "data.encoding"), ({"prompt_template": "{nope}"}, "prompt_template"), ({"prompt_template": "none"}, "prompt_template"), ({"prompt_template": "{prompt"}, "prompt_template"),
    ({"max_length": 2}, "max_length|rows|length"), ({"max_rows": 1}, "max_rows|rows"), ({"eval_fraction": 0.99}, "eval|rows|held"), ({"eval_fraction": 2}, "eval_fraction"), ({"chat_template": "nope"}, "chat_template"), ({"max_length": 0}, "max_length"), ({"packing": "nope"}, "packing"), ({"preference": "nope"}, "preference"),
]  # fmt: skip

PLACES = [
    "/none/data.jsonl", "./none.jsonl", "none.jsonl", "s3://", "s3://B/x", "s3://bucket/../x", "s3://bucket/a//b", "a/b/c/d", "https://host/data.jsonl", "file:///etc/passwd", "ftp://h/x.csv", "~nobody/x.jsonl", "-", "a b", "x\x1b[31m.jsonl", "/proc/self/mem.jsonl", "\0", "x" * 5000,
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> RowModel:
    return row_model(tiny_model, DataSettings())


def learned(source: Path | str, model: RowModel, output: Path, **given: object) -> Callable[[], object]:
    """What `run` and prepare-data do with the data, as an action."""

    def act() -> object:
        place = data_place(str(source))
        section = parse({"data": {"source": place.text, **given}}).data
        check_sources([place], section, model)
        return prepare_for(model, section, 42, output)

    return act


@pytest.mark.parametrize(("name", "content", "named"), FILES, ids=[name for name, _, _ in FILES])
def test_a_bad_file(name: str, content: str | bytes, named: str, model: RowModel, tmp_path: Path) -> None:
    check_refused(learned(written(tmp_path / name, content), model, tmp_path / "rows"), named)


@pytest.mark.parametrize(("name", "files", "named"), FOLDERS, ids=[name for name, _, _ in FOLDERS])
def test_a_bad_folder(
    name: str, files: dict[str, str | bytes], named: str, model: RowModel, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for each, content in files.items():
        written(folder / each, content)
    check_refused(learned(folder, model, tmp_path / "rows"), named)


@pytest.mark.parametrize(("given", "named"), SETTINGS, ids=str)
def test_a_setting_that_does_not_fit_the_data(
    given: dict[str, object], named: str, tiny_model: Path, tmp_path: Path
) -> None:
    source = written(tmp_path / "data.jsonl", FINE)

    def act() -> object:
        return learned(
            source, row_model(tiny_model, parse({"data": given}).data), tmp_path / "rows", **given
        )()

    check_refused(act, named)


@pytest.mark.parametrize("name", PLACES, ids=range(len(PLACES)))
def test_a_name_that_is_no_data(name: str, model: RowModel, tmp_path: Path) -> None:
    check_refused(learned(name, model, tmp_path / "rows"), "data.source|s3")


def test_the_same_without_the_fault_is_learned(model: RowModel, tmp_path: Path) -> None:
    assert learned(written(tmp_path / "fine.jsonl", FINE), model, tmp_path / "rows")().train_rows  # type: ignore[attr-defined]
