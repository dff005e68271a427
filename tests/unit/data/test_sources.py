"""Data files and folders: what is read as which split, and what is refused."""

import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.data.rows import PromptCompletion
from spectraqlora.data.sources import Source, open_source
from spectraqlora.errors import InputError
from spectraqlora.places import data_place
from spectraqlora.settings import DataSettings

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)]


def jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def marked(path: Path) -> None:
    """A file of one row that says which file it is."""
    jsonl(path, [{"text": path.name}])


def source_of(path: Path, **settings: Any) -> Source:
    return open_source(data_place(str(path)), DataSettings(**settings))


def splits(path: Path, **settings: Any) -> dict[str, list[str]]:
    source = source_of(path, **settings)
    return {
        split: [record["text"] for _, record, _ in source.records(DataSettings(**settings), split)]
        for split in source.splits
    }


def test_a_file_is_trained_on_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("test.jsonl", "D.JSONL", "rows.Ndjson"):
        path = Path(jsonl(tmp_path / name))
        rows = list(source_of(path).rows(DataSettings(), "train"))
        assert [(r.prompt, r.completion) for r in rows if isinstance(r, PromptCompletion)] == [
            (row["question"], row["answer"]) for row in ROWS
        ]
        assert list(source_of(path).splits) == ["train"]


def test_a_row_knows_its_file_and_its_line(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps(ROWS[2]))
    origins = [str(origin) for origin, _, _ in source_of(tmp_path).records(DataSettings(), "train")]
    assert origins == [
        f"{tmp_path}/a.jsonl, row 1",
        f"{tmp_path}/a.jsonl, row 2",
        f"{tmp_path}/b.jsonl, row 2",
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "test.jsonl"], {"train": ["train.jsonl"], "test": ["test.jsonl"]}),
        (
            ["train.jsonl", "dev.jsonl", "test.jsonl"],
            {"train": ["train.jsonl"], "held_out": ["dev.jsonl"], "test": ["test.jsonl"]},
        ),
        (["a.jsonl", "b.jsonl", "valid.jsonl"], {"train": ["a.jsonl", "b.jsonl"], "held_out": ["valid.jsonl"]}),
        (["my_train_set.jsonl", "my-val-2.jsonl"], {"train": ["my_train_set.jsonl"], "held_out": ["my-val-2.jsonl"]}),
        (["train.jsonl", "extra.jsonl"], {"train": ["train.jsonl"]}),
        (["latest.jsonl", "contest.jsonl", "trainer.jsonl"], {"train": ["contest.jsonl", "latest.jsonl", "trainer.jsonl"]}),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/validation-00000-of-00001.jsonl"],
         {"train": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], "held_out": ["validation-00000-of-00001.jsonl"]}),
        (["train/x.jsonl", "test/y.jsonl"], {"train": ["x.jsonl"], "test": ["y.jsonl"]}),
        (["my.train.jsonl", "my.dev.jsonl"], {"train": ["my.train.jsonl"], "held_out": ["my.dev.jsonl"]}),
        (["TRAIN.jsonl", "Test.jsonl"], {"train": ["TRAIN.jsonl"], "test": ["Test.jsonl"]}),
    ],
)  # fmt: skip
def test_files_are_the_splits_that_their_names_say(
    tmp_path: Path, names: list[str], expected: dict[str, list[str]]
) -> None:
    for name in names:
        marked(tmp_path / name)
    assert splits(tmp_path) == expected


def test_of_several_training_splits_one_is_named_and_its_own_test_split_goes_with_it(tmp_path: Path) -> None:
    names = [f"{split}-00000-of-00001.jsonl" for split in ("train_sft", "train_gen", "test_sft", "test_gen")]
    for name in names:
        marked(tmp_path / "data" / name)
    with pytest.raises(InputError, match=r"data\.split.*train_gen, train_sft"):
        splits(tmp_path)
    assert splits(tmp_path, split="train_gen") == {"train": [names[1]], "test": [names[3]]}


def test_what_is_not_read_is_known_by_name(tmp_path: Path) -> None:
    for name in ("train.jsonl", "extra.jsonl"):
        marked(tmp_path / name)
    assert source_of(tmp_path).unused == ["extra.jsonl"]


def test_descriptions_caches_and_hidden_files_are_no_data(tmp_path: Path) -> None:
    marked(tmp_path / "a.jsonl")
    for name in ("README.md", "LICENSE.txt", "notes.txt", "dataset_info.json", ".hidden.jsonl", "pic.png"):
        (tmp_path / name).write_text("no data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.jsonl").write_text("no data")
    assert splits(tmp_path) == {"train": ["a.jsonl"]}


def test_texts_are_data_where_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "one.md").write_text("# One")
    (tmp_path / "two.txt").write_text("")
    with pytest.raises(InputError, match="files of one kind"):
        splits(tmp_path)
    (tmp_path / "two.txt").unlink()
    assert splits(tmp_path) == {"train": ["# One"]}


def test_what_datasets_saves_is_read_with_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([{"text": str(i), "when": "2024-01-03"} for i in range(5)])
    table.save_to_disk(str(tmp_path / "one"), num_shards=2)
    table.map(
        lambda row: {"text": row["text"] + "!"}, cache_file_name=str(tmp_path / "one" / "cache-12.arrow")
    )
    assert splits(tmp_path / "one") == {"train": ["0", "1", "2", "3", "4"]}
    parts = {
        "train_sft": table.select([0, 1]),
        "test_sft": table.select([2]),
        "validation": table.select([3]),
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "many"))
    expected = {"train": ["0", "1"], "held_out": ["3"], "test": ["2"]}
    assert splits(tmp_path / "many") == splits(tmp_path / "many", split="train_sft") == expected
    assert splits(tmp_path / "many", split="test_sft+validation") == {"train": ["2", "3"]}
    with pytest.raises(InputError, match=r"data\.split.*test_sft, train_sft, validation"):
        splits(tmp_path / "many", split="train_gen")
    with pytest.raises(InputError, match=r"data\.max_rows"):
        splits(tmp_path / "many", split="train[:10]")


def test_sequences_as_datasets_stores_them_are_messages(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value

    struct = {"role": Value("string"), "content": Value("string")}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name, feature, value in (
        ("list", List(struct), messages),
        ("columns", {"role": List(Value("string")), "content": List(Value("string"))},
         {"role": ["user", "assistant"], "content": ["q", "a"]}),
    ):  # fmt: skip
        Dataset.from_list([{"messages": value}], features=Features({"messages": feature})).save_to_disk(
            str(tmp_path / name)
        )
        assert [r.messages for r in source_of(tmp_path / name).rows(DataSettings(), "train")] == [messages]  # type: ignore[union-attr]


CARD = """---
license: mit
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy/*.jsonl
  - split: test
    path: held/final.jsonl
- config_name: hard
  data_files: "hard/**"
---
# Rows
"""


def test_a_readme_says_which_files_are_which_split(tmp_path: Path) -> None:
    for name in ("easy/a.jsonl", "held/final.jsonl", "hard/deep/c.jsonl", "other.jsonl"):
        marked(tmp_path / name)
    (tmp_path / "README.md").write_text(CARD)
    assert splits(tmp_path, subset="easy") == {"train": ["a.jsonl"], "test": ["final.jsonl"]}
    assert splits(tmp_path, subset="hard") == {"train": ["c.jsonl"]}
    with pytest.raises(InputError, match=r"data\.subset.*easy, hard"):
        splits(tmp_path)
    (tmp_path / "README.md").write_text(
        CARD.replace("config_name: easy", "config_name: easy\n  default: true")
    )
    assert splits(tmp_path)["train"] == ["a.jsonl"]
    (tmp_path / "README.md").write_text("---\n: broken: [yaml\n---\n")
    assert set(splits(tmp_path)) == {"train"}


def test_what_a_readme_names_and_nobody_has_is_told_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("easy/a.jsonl", "other/test.jsonl"):
        marked(tmp_path / name)
    readme = tmp_path / "README.md"

    def told() -> str:
        caplog.clear()
        splits(tmp_path)
        return " ".join(record.getMessage() for record in caplog.records)

    one = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    readme.write_text(f"{one}  - {{split: train, path: gone/*.jsonl}}\n---\n")
    assert "no file is what its README names as train: gone/*.jsonl; splits are what files are" in told()
    assert splits(tmp_path) == {"train": ["a.jsonl"], "test": ["test.jsonl"]}
    readme.write_text(
        f"{one}  - {{split: train, path: easy/*}}\n  - {{split: test, path: held/x.jsonl}}\n---\n"
    )
    assert "names as test: held/x.jsonl" in told() and "splits are" not in told()
    assert splits(tmp_path) == {"train": ["a.jsonl"]}
    readme.write_text("---\n: broken: [yaml\n---\n")
    assert "its README's head is no YAML" in told()
    readme.write_text("---\nlicense: mit\n---\n")
    assert told() == ""
    readme.write_text(CARD)
    (tmp_path / "easy" / "a.jsonl").rename(tmp_path / "b.jsonl")
    with pytest.raises(
        InputError, match=r"^data\.subset: 'hard': expected a subset with files; .* train: hard/\*"
    ):
        splits(tmp_path, subset="hard")


def test_bad_sources_are_refused_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "x.pdf").write_text("x")
    jsonl(tmp_path / "only" / "test.jsonl")
    jsonl(tmp_path / "mixed" / "a.jsonl")
    (tmp_path / "mixed" / "b.csv").write_text("question,answer\nq,a\n")
    for name in ("model/config.json", "model/tokenizer.json", "run/adapter/adapter_config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    cases = {
        "none.jsonl": "existing file",
        "e.jsonl": "file is empty",
        "x.pdf": "one of .jsonl",
        "folder": "a folder with .jsonl",
        "only": "a file to train on, or the path of one; it has test",
        "mixed": "files of one kind",
        "model": "data; this is a model's folder, for model.base_model",
        "run": "data; adapter is a model's folder",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            source_of(tmp_path / name)
        assert "\n" not in str(caught.value), name


def test_one_kind_of_rows_may_be_packed_in_several_ways(tmp_path: Path) -> None:
    marked(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}'))
    (tmp_path / "c.ndjson").write_text('{"text": "c"}')
    assert splits(tmp_path) == {"train": ["a.jsonl", "b", "c"]}


@pytest.fixture
def memory_of_rows(tmp_path: Path) -> Iterator[Any]:
    """How many bytes a process needs more for a file of so many rows."""
    yield lambda name, count: _peak(tmp_path / name, count)


def _peak(path: Path, count: int) -> int:
    import subprocess

    row = json.dumps(
        {"messages": [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "y"}]}
    )
    with open(path, "w") as stream:
        if path.suffix == ".json":
            stream.write("[" + ",\n".join([row] * count) + "]")
        else:
            stream.writelines([row + "\n"] * count)
    script = f"""
import resource
from spectraqlora.data.sources import open_source
from spectraqlora.places import data_place
from spectraqlora.settings import DataSettings
rows = open_source(data_place({str(path)!r}), DataSettings()).rows(DataSettings(), "train")
for number, row in enumerate(rows):
    if number == 100:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout) * 1024


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_rows_are_read_one_at_a_time(memory_of_rows: Any, name: str) -> None:
    # 20,000 rows are 10 MB of text.
    assert memory_of_rows(name, 20_000) < 8 * 2**20
