"""What a name is: the sample, a hub id, a path or an address, the same for base models and data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.files import file_digest, folder_digest
from spectraqlora.places import Place, base_digest, base_place, data_place, file_place, kind_of

from tests.hub import Hub


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with models and data in it, which is the user's home as well."""
    for folder in ("model", "owner/cloned", "gpt3"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(folder.encode())
    (tmp_path / "rows").mkdir()
    for file in ("rows.jsonl", "rows/part.csv", "table.parquet"):
        (tmp_path / file).write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("parse", [base_place, data_place])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sample", "sample"),
        ("gpt2", "hub"),
        ("imdb", "hub"),
        ("owner/name", "hub"),
        ("Qwen/Qwen3-0.6B", "hub"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "hub"),
        ("owner/name_with.dots-and_more", "hub"),
        ("s3://bucket", "s3"),
        ("s3://bucket/models/llama", "s3"),
        ("s3://bucket/rows.jsonl", "s3"),
        ("model", "path"),
        ("./model", "path"),
        ("owner/cloned", "path"),
        ("gpt3", "path"),
        ("~/model", "path"),
        (".", "path"),
    ],
)
def test_a_name_is_the_same_kind_for_base_models_and_data(
    here: Path, parse: Callable[[str], Place], name: str, kind: str
) -> None:
    place = parse(name)
    assert place.kind == kind == kind_of(name)
    if kind == "path":
        assert place.path.is_absolute() and os.path.samefile(place.path, os.path.expanduser(name))
    else:
        assert str(place) == name


@pytest.mark.parametrize(
    "name",
    [
        "", "/none", "./none", "../none", "~/none", "~nobody/none", ".hidden", "none/", "a/b/c", "owner/name/", "a//b",
        "none.jsonl", "none.json", "none.csv", "none.parquet", "folder/none.jsonl", "none.txt", "none.safetensors",
        "https://huggingface.co/gpt2", "gs://bucket/model", "S3://bucket/model", "two words", "owner/näme",
    ],
)  # fmt: skip
def test_a_path_that_does_not_exist_is_refused_as_a_path(here: Path, name: str) -> None:
    for parse, expected in ((base_place, "an existing folder"), (data_place, "an existing file or folder")):
        with pytest.raises(InputError, match=expected) as caught:
            parse(name)
        message = str(caught.value)
        assert repr(name) in message and "\n" not in message
        assert "owner/name" in message and "s3://" in message, "says what else it could have been"


@pytest.mark.parametrize("name", ["s3://", "s3://B/x", "s3://bucket/a//b", "s3://bucket/../x"])
def test_a_malformed_address_is_refused_as_an_address(name: str) -> None:
    for field, parse in (("model.base_model", base_place), ("data.source", data_place)):
        with pytest.raises(InputError, match=rf"{field}.*s3://|{field}.*prefix"):
            parse(name)


def test_a_file_is_no_base_model_and_a_folder_no_table(here: Path) -> None:
    with pytest.raises(InputError, match=r"model\.base_model.*a folder"):
        base_place("rows.jsonl")
    with pytest.raises(InputError, match=r"snr\.table.*an existing file"):
        file_place("rows", "snr.table")
    for name in ("sample", "gpt2", "owner/name"):
        with pytest.raises(InputError, match=r"snr\.table.*an existing file"):
            file_place(name, "snr.table")
    assert file_place("table.parquet", "snr.table").path == here / "table.parquet"
    assert file_place("s3://bucket/t.parquet", "snr.table").kind == "s3"


def test_a_path_means_the_same_from_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = data_place("rows.jsonl")
    monkeypatch.chdir(here / "rows")
    assert data_place(place.text) == place
    assert place.local_copy() == here / "rows.jsonl"


def test_a_link_to_a_file_without_a_suffix_keeps_its_name(here: Path) -> None:
    (here / "blobs").mkdir()
    (here / "rows.jsonl").rename(here / "blobs" / "0a1b")
    (here / "rows.jsonl").symlink_to("blobs/0a1b")
    assert data_place("rows.jsonl").path == here / "rows.jsonl"
    (here / "linked").symlink_to("model")
    assert base_place("linked") == base_place("model"), "one folder, whatever it is called by"


def test_a_digest_is_that_of_the_content(here: Path) -> None:
    assert data_place("rows.jsonl").digest() == file_digest(here / "rows.jsonl")
    assert data_place("rows").digest() == folder_digest(here / "rows")
    assert base_place("model").digest() == folder_digest(here / "model") != base_place("gpt3").digest()
    with pytest.raises(InputError, match="a folder with files"):
        base_place("rows").digest()


def test_of_a_base_model_counts_what_it_is_loaded_from(here: Path) -> None:
    before = base_place("model").digest()
    (here / "model" / "README.md").write_text("a card")
    (here / "model" / "pytorch_model.bin").write_bytes(b"pickled")
    (here / "model" / "modeling_own.py").write_text("code")
    assert base_place("model").digest() == before
    trusted = base_place("model", trusted=True).digest()
    assert trusted not in (before, base_digest(here / "gpt3", trusted=True))
    for name in ("chat_template.jinja", "tokenizer.json", "merges.txt", "spiece.model"):
        earlier = base_place("model").digest()
        (here / "model" / name).write_text("changed")
        assert base_place("model").digest() != earlier, name


def test_of_the_sample_and_of_data_on_the_hub_there_is_no_copy() -> None:
    for place in (base_place("sample"), data_place("sample"), data_place("owner/rows")):
        with pytest.raises(InputError, match="no local copy"):
            place.local_copy()


def test_a_folder_that_went_away_is_refused_with_one_line(here: Path) -> None:
    place = base_place("model")
    shutil.rmtree(here / "model")
    with pytest.raises(InputError, match="a folder with files"):
        place.digest()


# --- on the hub --------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


def say(environment: dict[str, str], *expressions: str) -> list[str]:
    """What expressions come to in a process of their own, whose hub client reads its variables anew."""
    script = f"""
import sys
from spectraqlora.data.sources import open_source
from spectraqlora.errors import InputError
from spectraqlora.places import base_place, data_place
from spectraqlora.settings import DataSettings
for expression in {expressions!r}:
    try:
        print("::", eval(expression))
    except InputError as error:
        print("::", error)
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    return [line.removeprefix(":: ") for line in done.stdout.splitlines() if line.startswith("::")]


def test_one_name_is_a_base_model_and_a_data_set_each_with_its_commit(here: Path, hub: Hub) -> None:
    rows = here / "published"
    rows.mkdir()
    (rows / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3)))
    model = hub.publish("models", "legacy/gpt2", here / "model")
    data = hub.publish("datasets", "legacy/gpt2", rows)
    environment = hub.environment(here / "hub")
    first = say(
        environment,
        "base_place('gpt2').digest()",
        "data_place('gpt2').digest()",
        "base_place('gpt2').local_copy()",
        f"[row.text for row in open_source(data_place('gpt2'), DataSettings(), {data!r}).rows(DataSettings(), 'train')]",
    )
    assert first[:2] == [model, data] and model != data
    assert base_digest(Path(first[2])) == base_digest(here / "model")
    assert first[3] == "['row 0', 'row 1', 'row 2']"
    # The same without the hub, from this machine's copies.
    again = say(
        {**environment, "HF_HUB_OFFLINE": "1"},
        "base_place('gpt2').digest(offline=True)",
        "data_place('legacy/gpt2').digest(offline=True)",
        "base_place('gpt2').local_copy()",
    )
    assert again == first[:3]


def test_a_commit_is_fetched_as_it_was_after_its_branch_moved(here: Path, hub: Hub) -> None:
    before = hub.publish("models", "owner/name", here / "model")
    (here / "model" / "model.safetensors").write_bytes(b"other weights")
    (here / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (here / "model" / "README.md").write_text("not loaded")
    after = hub.publish("models", "owner/name", here / "model")
    environment = hub.environment(here / "hub")
    now, old, new = say(
        environment,
        "base_place('owner/name').digest()",
        f"base_place('owner/name').local_copy({before!r})",
        "base_place('owner/name').local_copy()",
    )
    assert now == after != before
    assert (Path(old) / "model.safetensors").read_bytes() == b"model"
    assert {path.name for path in Path(new).iterdir()} == {
        "config.json",
        "model.safetensors",
        "chat_template.jinja",
    }
    assert base_digest(Path(new)) == base_place("model").digest()


def test_what_the_hub_does_not_have_is_refused_and_what_cannot_be_asked_for_too(here: Path, hub: Hub) -> None:
    hub.publish("models", "owner/name", here / "model")
    environment = hub.environment(here / "hub")
    missing, revision = say(
        environment,
        "base_place('owner/none').digest(offline=True)",
        "base_place('owner/name', 'v9').digest(offline=True)",
    )
    assert "'owner/none': expected a hub model that exists" in missing
    assert "revision 'v9'" in revision
    away = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    base, data, unknown = say(
        away,
        "base_place('owner/name').digest()",
        "data_place('owner/name').digest()",
        "repr(base_place('owner/name').digest(offline=True))",
    )
    assert "model.base_model: 'owner/name': expected a folder or a reachable hub model" in base
    assert (
        "data.source: 'owner/name': expected an existing file or folder or a reachable hub data set" in data
    )
    assert unknown == base, "without a copy here it is no commit either"
