"""Models, data, tables and exports at s3:// addresses, through the command line and the steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from spectraqlora.artifacts import FourBitModel, MergedModel
from spectraqlora.errors import InputError
from spectraqlora.models import adapters
from spectraqlora.places import base_place, data_place
from spectraqlora.settings import ExportSettings, ModelSettings, SnrSettings, parse
from spectraqlora.snr.table import read_table
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze
from spectraqlora.storage import download_folder, parse_address, upload_file, upload_folder
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.local import preflight

from tests.integration.test_dag import CLI
from tests.s3 import BUCKET, SECRET_KEY, Fault, Proxy, Server, environment, free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(autouse=True)
def store(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in environment(server.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(server: Server, tiny_model: Path) -> str:
    """The tiny model as another client uploads it."""
    server.put_plain(tiny_model, "models/tiny")
    return f"s3://{BUCKET}/models/tiny"


@pytest.fixture(scope="module")
def rows(server: Server, tiny_rows: Path) -> str:
    """The prefix of the tiny data set."""
    server.put_plain(tiny_rows.parent, "data")
    return f"s3://{BUCKET}/data"


def spectraqlora(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments], capture_output=True, text=True, timeout=560, env={**os.environ, **variables}
    )


def test_snr_of_a_model_in_object_storage_needs_no_copy_of_it(
    model: str, tiny_model: Path, tmp_path: Path
) -> None:
    for place, name in ((model, "remote"), (str(tiny_model), "local")):
        done = spectraqlora("snr", place, "--output", str(tmp_path / f"{name}.parquet"))
        assert done.returncode == 0, done.stderr
    remote, local = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("remote", "local"))
    pd.testing.assert_frame_equal(remote, local)
    assert not (tmp_path / "cache").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_packed_model_is_scanned_in_object_storage_as_on_disk(
    server: Server, quantized: Path, tmp_path: Path
) -> None:
    from spectraqlora.models.remote_tensors import S3Tensors
    from spectraqlora.models.tensors import LocalTensors
    from spectraqlora.snr.scan import scan

    upload_folder(quantized / "model", parse_address(f"s3://{BUCKET}/models/packed"))
    remote = S3Tensors(parse_address(f"s3://{BUCKET}/models/packed"))
    assert remote.packed
    pd.testing.assert_frame_equal(scan(remote), scan(LocalTensors(quantized / "model")))


def test_steps_take_the_base_from_its_address_and_notice_another_one(
    server: Server, model: str, tiny_model: Path, tmp_path: Path
) -> None:
    from spectraqlora.models.loading import original_folder

    address = f"s3://{BUCKET}/models/changing"
    upload_folder(tiny_model, parse_address(address))
    content = base_place(address).digest()
    folder = tmp_path / "quantized"
    manifest = quantize(ModelSettings(base_model=address), folder, tmp_path / "outline", content)
    local = quantize(
        ModelSettings(base_model=str(tiny_model)), tmp_path / "local", tmp_path / "local-outline"
    )
    assert manifest.base_digest == local.base_digest and manifest.source_content == content
    analyze(Inputs(tmp_path / "outline"), SnrSettings(), tmp_path / "table")
    analyze(Inputs(tmp_path / "local-outline"), SnrSettings(), tmp_path / "expected")
    pd.testing.assert_frame_equal(read_table(tmp_path / "table"), read_table(tmp_path / "expected"))
    assert original_folder(FourBitModel.read(folder)).is_relative_to(tmp_path / "cache")

    (tmp_path / "changed").mkdir()
    for path in tiny_model.iterdir():
        (tmp_path / "changed" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "changed" / "note.txt").write_text("another model")
    upload_folder(tmp_path / "changed", parse_address(address))
    assert base_place(address).digest() != content
    for act in (
        lambda: analyze(Inputs(tmp_path / "outline"), SnrSettings(), tmp_path / "again"),
        lambda: original_folder(FourBitModel.read(folder)),
        lambda: quantize(ModelSettings(base_model=address), tmp_path / "q", tmp_path / "o", content),
    ):
        with pytest.raises(InputError, match="replaced since"):
            act()


def test_the_content_digest_follows_what_is_there(server: Server, tmp_path: Path) -> None:
    for published in (True, False):
        address = parse_address(f"s3://{BUCKET}/digest/{published}")
        folder = tmp_path / str(published)
        folder.mkdir()
        found = []
        for text in ("one", "two", "one"):
            (folder / "rows.jsonl").write_text(text)
            upload_folder(folder, address) if published else server.put_plain(folder, address.key)
            found.append(data_place(str(address)).digest())
        assert found[0] == found[2] != found[1]
    upload_file(folder / "rows.jsonl", address.child("one-file"))
    assert data_place(str(address.child("one-file"))).digest()


def test_the_export_is_published(quantized: Path, prepared: Path, tmp_path: Path, server: Server) -> None:
    from spectraqlora.models.loading import load_four_bit
    from spectraqlora.settings import EvaluateSettings
    from spectraqlora.steps.merge_export.merge import Inputs as MergeInputs
    from spectraqlora.steps.merge_export.merge import merge_export

    from tests.unit.models.test_adapters import Q0, randomize, rank_map
    from tests.unit.results import evaluation

    wrapped = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {Q0: 4}))
    randomize(wrapped)
    winner = tmp_path / "winner"
    adapters.save(wrapped, winner / "adapter", "base")
    evaluation("alors", [1.0, 2.0], 100).write(winner)
    destination = f"s3://{BUCKET}/exports/tiny"
    (tmp_path / "exported").mkdir()
    result = merge_export(
        MergeInputs(quantized, prepared, winner),
        EvaluateSettings(),
        tmp_path / "exported",
        ExportSettings(destination=destination),
    )
    assert MergedModel.read(tmp_path / "exported") == result
    for name in ("merged", "adapter"):
        download_folder(parse_address(f"{destination}/{name}"), tmp_path / "back" / name)
        for path in (tmp_path / "exported" / name).rglob("*"):
            assert (tmp_path / "back" / name / path.name).read_bytes() == path.read_bytes()
        assert result.published[name].startswith(f"{destination}/{name}/")
    assert torch.equal(
        adapters.read_adapter_weights(tmp_path / "back" / "adapter")[f"{Q0}.lora_A"],
        adapters.read_adapter_weights(winner / "adapter")[f"{Q0}.lora_A"],
    )


def test_preflight_reads_no_weights(
    server: Server, model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "snr.json"
    assert spectraqlora("snr", model, "--spectrum-json", str(table)).returncode == 0
    upload_file(table, parse_address(f"s3://{BUCKET}/tables/snr.json"))
    settings = parse(
        {
            "snr": {"table": f"s3://{BUCKET}/tables/snr.json"},
            "checkpoint": {"destination": f"s3://{BUCKET}/checkpoints"},
            "export": {"destination": f"s3://{BUCKET}/outcome"},
        }
    )
    with Proxy(server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        preflight.check(settings, base_place(model), [data_place(rows)])
        weights = [r for r in proxy.requests if r.path.endswith(".safetensors") and r.method == "GET"]
        assert weights and all(r.range in ("bytes=0-65535", "bytes=0-0") for r in weights)
    left = [
        p
        for name in ("checkpoints", "outcome")
        for p in (server.folder / BUCKET / name).rglob("*")
        if p.is_file()
    ]
    assert left == [], "asking whether one may write leaves nothing behind"


def test_what_is_wrong_with_an_address_is_one_line_and_exit_code_2(
    server: Server,
    model: str,
    rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.put_plain(tmp_path_with(tmp_path / "no-model", "notes.pdf", "hello"), "no-model")
    server.put_plain(tmp_path_with(tmp_path / "pickled", "pytorch_model.bin", "x", "config.json"), "pickled")
    server.put_plain(tmp_path_with(tmp_path / "columns", "a.jsonl", '{"foo": 1}\n' * 12), "columns")
    table = json.dumps({"model.layers.0.mlp.up_proj": {"snr": 1.0, "type": "mlp.up_proj"}})
    server.put_plain(tmp_path_with(tmp_path / "table", "snr.json", table), "table")
    good = {"--base-model": model, "--data": rows, "--workdir": str(tmp_path / "w")}
    refused = Fault("refuse", 403, "AccessDenied")
    skewed = Fault("refuse", 403, "RequestTimeTooSkewed")
    region = Fault("refuse", 301, "PermanentRedirect")

    cases: list[tuple[dict[str, str], dict[str, str], tuple[str, ...]]] = [
        ({"--base-model": "s3://no-such-bucket/m"}, {}, ("no-such-bucket", "404")),
        ({"--base-model": f"s3://{BUCKET}/no-model"}, {}, ("model.base_model", "config.json")),
        ({"--base-model": f"s3://{BUCKET}/pickled"}, {}, ("pickled weights only",)),
        ({"--base-model": f"s3://{BUCKET}/nothing"}, {}, ("nothing", "there are none")),
        ({"--base-model": "s3://B/x"}, {}, ("model.base_model", "lower-case")),
        ({"--data": f"s3://{BUCKET}/nothing"}, {}, ("nothing", "there are none")),
        ({"--data": f"s3://{BUCKET}/no-model"}, {}, ("data.source", ".jsonl")),
        ({"--data": f"s3://{BUCKET}/columns"}, {}, ("data.columns",)),
        ({"--snr-table": f"s3://{BUCKET}/table/snr.json"}, {}, ("snr.table", "a row for each")),
        ({"--set": "checkpoint.destination=/tmp/x"}, {}, ("checkpoint.destination", "s3://")),
        ({"--set": "checkpoint.destination=s3://no-such-bucket/c"}, {}, ("no-such-bucket",)),
        ({"--set": "export.destination=s3://no-such-bucket/e"}, {}, ("no-such-bucket",)),
        ({}, {"AWS_SECRET_ACCESS_KEY": "wrong"}, ("AWS_SECRET_ACCESS_KEY", "403")),
        ({}, {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}, ("AWS_ENDPOINT_URL",)),
    ]

    def check(changes: dict[str, str], variables: dict[str, str], words: tuple[str, ...]) -> None:
        arguments = [part for pair in {**good, **changes}.items() for part in pair]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["spectraqlora", "run", *arguments])
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                app.main()
        printed = capsys.readouterr()
        away = words == ("AWS_ENDPOINT_URL",)
        assert end.value.code == (75 if away else 2), (changes, variables, printed)
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        assert all(word in printed.err for word in words), printed.err
        assert SECRET_KEY not in printed.out + printed.err
        assert not (tmp_path / "w").exists()

    for fault, word in ((refused, "permission (s3:"), (skewed, "clock"), (region, "AWS_REGION")):
        with Proxy(server.port, lambda r, fault=fault: fault) as proxy:
            check({}, {"AWS_ENDPOINT_URL": proxy.endpoint}, (word,))
    for changes, variables, words in cases:
        check(changes, variables, words)


def tmp_path_with(folder: Path, name: str, text: str, *others: str) -> Path:
    """A folder with a file of this text, and others that hold an empty JSON object."""
    folder.mkdir()
    (folder / name).write_text(text)
    for other in others:
        (folder / other).write_text("{}")
    return folder
