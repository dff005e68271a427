"""Against Ceph's radosgw, which enforces conditions, permissions, clocks and versioning as Amazon's store does."""

from __future__ import annotations

import datetime
import json
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.errors import InputError
from spectraqlora.storage import (
    Address,
    Connection,
    ObjectChanged,
    check_writable,
    download_folder,
    folders_below,
    parse_address,
    ranged_reader,
    remove_folder,
    upload_file,
    upload_folder,
)

from tests.ceph import Ceph, missing_programs
from tests.integration.test_dag import CLI
from tests.s3 import BUCKET, SECRET_KEY, environment

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"needs {', '.join(missing_programs())}: tests/install_servers.sh"
    ),
]
MIB = 1 << 20


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    with Ceph(tmp_path_factory.mktemp("ceph")) as running:
        yield running


@pytest.fixture(autouse=True)
def store(ceph: Ceph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in environment(ceph.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Address:
    return parse_address(f"s3://{BUCKET}/{request.node.name}")


def connect() -> Connection:
    return Connection(workers=4, part_bytes=5 * MIB)


def make_folder(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    noise = random.Random(seed)
    (folder / "large.bin").write_bytes(noise.randbytes(12 * MIB + 17))
    (folder / "small + ü%.json").write_bytes(noise.randbytes(300))
    (folder / "empty").write_bytes(b"")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text and SECRET_KEY not in text
    assert all(word in text for word in words), text


def test_publishing_reading_and_removing(tmp_path: Path, address: Address) -> None:
    check_writable(address, connect())
    for seed in (1, 2, 3):
        upload_folder(make_folder(tmp_path / "source", seed), address, connect())
        download_folder(address, tmp_path / "target", connect())
        assert contents(tmp_path / "target") == contents(tmp_path / "source")
    versions = [name for name in folders_below(address, connect()) if name.startswith("_files-")]
    assert len(versions) == 2
    remove_folder(address, connect())
    refused(lambda: download_folder(address, tmp_path / "other", connect()), "there are none")


def test_an_interrupted_multipart_upload_is_taken_up(
    tmp_path: Path, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "source", 4)
    sent: list[int] = []
    call = Connection.call

    def interrupted(self: Connection, operation: str, address: Address, **arguments: Any) -> dict[str, Any]:
        if operation == "upload_part":
            if len(sent) == 2:
                raise InputError("power", "cut", "none")
            sent.append(arguments["PartNumber"])
        return call(self, operation, address, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "call", interrupted)
        with pytest.raises(InputError, match="power"):
            upload_folder(source, address, Connection(workers=1, part_bytes=5 * MIB))
    resumed: list[int] = []

    def counted(self: Connection, operation: str, address: Address, **arguments: Any) -> dict[str, Any]:
        if operation == "upload_part":
            resumed.append(arguments["PartNumber"])
        return call(self, operation, address, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "call", counted)
        upload_folder(source, address, connect())
    assert sorted([*sent, *resumed]) == [1, 2, 3]
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(source)


def test_a_condition_keeps_a_reader_from_mixing_two_objects(tmp_path: Path, address: Address) -> None:
    path = tmp_path / "object"
    path.write_bytes(b"a" * 100)
    upload_file(path, address, connect())
    reader = ranged_reader(address, connect())
    assert reader.read(0, 10) == b"a" * 10
    path.write_bytes(b"b" * 100)
    upload_file(path, address, connect())
    with pytest.raises(ObjectChanged):
        reader.read(10, 10)


def test_two_writers_at_one_address_leave_one_whole_version(tmp_path: Path, address: Address) -> None:
    folders = [make_folder(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for _ in range(3):
        writers = [threading.Thread(target=upload_folder, args=(f, address, connect())) for f in folders]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        download_folder(address, tmp_path / "target", connect())
        assert contents(tmp_path / "target") in [contents(folder) for folder in folders]


def test_a_bucket_with_versioning(ceph: Ceph, tmp_path: Path) -> None:
    client: Any = ceph.client()
    client.create_bucket(Bucket="versioned")
    client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    address = parse_address("s3://versioned/model")
    for seed in (1, 2, 3):
        upload_folder(make_folder(tmp_path / "source", seed), address, connect())
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(tmp_path / "source")
    remove_folder(address, connect())
    assert folders_below(address, connect()) == {}
    kept = client.list_object_versions(Bucket="versioned", Prefix="model/_manifest.json")
    assert len(kept["Versions"]) == 3 and len(kept["DeleteMarkers"]) == 1


def test_refusals_are_told_apart(
    ceph: Ceph, tmp_path: Path, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(make_folder(tmp_path / "source", 5), address, connect())

    def read() -> None:
        download_folder(address, tmp_path / "target", connect())

    missing = parse_address("s3://no-such-bucket/x")
    refused(lambda: download_folder(missing, tmp_path / "m", connect()), "no-such-bucket", "404")
    refused(lambda: check_writable(missing, connect()), "no-such-bucket", "404")
    nothing = address.child("nothing")
    refused(lambda: download_folder(nothing, tmp_path / "n", connect()), "there are none")
    ceph.create_user("STRANGER", "stranger-secret")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "STRANGER")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "stranger-secret")
        refused(read, "permission (s3:", "403")
        refused(lambda: check_writable(address, connect()), "s3:PutObject", "403")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        refused(read, "AWS_SECRET_ACCESS_KEY", "403")
        patch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
        refused(read, "access key that the store knows", "403")
    with monkeypatch.context() as patch:
        ahead = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)
        patch.setattr("botocore.auth.get_current_datetime", lambda *_: ahead.replace(tzinfo=None))
        refused(read, "clock", "403")
    read()


@pytest.mark.soak
def test_the_whole_dag_with_everything_in_object_storage(
    ceph: Ceph, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """Base, data, table, checkpoints and export; two rounds; then other data."""
    upload_folder(tiny_model, parse_address(f"s3://{BUCKET}/base"))
    client: Any = ceph.client()
    client.upload_file(str(tiny_rows), BUCKET, "rows/part-1.jsonl")
    subprocess.run(
        [*CLI, "snr", f"s3://{BUCKET}/base", "--output", str(tmp_path / "snr.parquet")], check=True
    )
    client.upload_file(str(tmp_path / "snr.parquet"), BUCKET, "tables/snr.parquet")
    arguments = [
        "run", "--base-model", f"s3://{BUCKET}/base", "--data", f"s3://{BUCKET}/rows",
        "--snr-table", f"s3://{BUCKET}/tables/snr.parquet", "--workdir", str(tmp_path / "w"),
        "--methods", "hybrid", "--rounds", "2", "--max-steps", "8", "--set", "select.rank=4",
        "--set", "evaluate.accuracy_rows=0", "--set", f"checkpoint.destination=s3://{BUCKET}/checkpoints",
        "--set", "checkpoint.every_steps=4", "--set", f"export.destination=s3://{BUCKET}/winner",
    ]  # fmt: skip
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert set(summary["published"]) == {"merged", "adapter"} and f"s3://{BUCKET}/winner" in done.stdout
    log = (tmp_path / "w" / "run.log").read_text()
    assert f"downloading s3://{BUCKET}/base, MiB" in log and "uploading" in log

    trainings = folders_below(parse_address(f"s3://{BUCKET}/checkpoints"))
    assert len(trainings) == 2, "one for each round"
    for name in trainings:
        kept = folders_below(parse_address(f"s3://{BUCKET}/checkpoints/{name}"))
        assert len(kept) == 2 and all(kept.values())

    for name in ("merged", "adapter"):
        download_folder(parse_address(f"s3://{BUCKET}/winner/{name}"), tmp_path / name)
    probe = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 20)[None]
merged = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r})
base = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r})
plain = base(ids).logits
tuned = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})(ids).logits
assert not torch.allclose(plain, tuned, atol=1e-3)
assert merged(ids).logits.shape == tuned.shape
"""
    subprocess.run([CLI[0].replace("spectraqlora", "python"), "-c", probe], check=True)

    again = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=3000)
    assert again.returncode == 0, again.stdout + again.stderr
    client.put_object(
        Bucket=BUCKET, Key="rows/part-1.jsonl", Body=tiny_rows.read_bytes() + tiny_rows.read_bytes()[:500]
    )
    other = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=3000)
    assert (
        other.returncode == 2 and "one JSON object per line" in other.stderr and other.stderr.count("\n") == 1
    )
    for text in (done.stdout, log, json.dumps(summary)):
        assert SECRET_KEY not in text
    written = (path for path in (tmp_path / "w").rglob("*") if path.is_file() and path.stat().st_size < MIB)
    assert not any(SECRET_KEY.encode() in path.read_bytes() for path in written)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET_KEY
