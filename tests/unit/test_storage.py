"""Object storage against a real S3 server: what is published is what is read, whatever happens on the way."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import spectraqlora
from spectraqlora.errors import InputError
from spectraqlora.models.remote_tensors import S3Tensors
from spectraqlora.storage import (
    Address,
    Connection,
    content_digest,
    download_file,
    download_folder,
    exists,
    list_files,
    local_copy,
    parse_address,
    ranged_reader,
    upload_file,
    upload_folder,
)

from tests.s3 import BUCKET, SECRET_KEY, Fault, Proxy, Request, Server, environment, free_port

MIB = 1 << 20
PART = 5 * MIB
"""Bytes; the smallest part that S3 knows keeps the test files small."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, server.endpoint)


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Address:
    """A folder of the test's own."""
    return parse_address(f"s3://{BUCKET}/{request.node.name}/model")


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, secret: str = SECRET_KEY) -> None:
    for name, value in environment(endpoint, secret).items():
        monkeypatch.setenv(name, value)


def connect(patience_s: float = 60.0, workers: int = 4) -> Connection:
    """A connection as the environment is now. Making one takes a third of a second: equal ones are shared."""
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")
    return _connect(tuple(os.environ.get(name) for name in names), patience_s, workers)


@functools.cache
def _connect(_: tuple[str | None, ...], patience_s: float, workers: int) -> Connection:
    return Connection(workers=workers, part_bytes=PART, patience_s=patience_s)


def make_folder(folder: Path, seed: int = 0, large: int = 12 * MIB + 345) -> Path:
    """A large file of three parts, small ones, an empty one, and names that need quoting."""
    noise = random.Random(seed)
    for name, size in (
        ("model.bin", large),
        ("config.json", 700),
        ("sub/a name + ü%.txt", 3000),
        ("empty.txt", 0),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise.randbytes(size))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file, without the download's record."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and SECRET_KEY not in text
    return text


def every(count: int, kind: Fault) -> Callable[[Request], Fault | None]:
    return lambda request: kind if request.number % count == count - 1 else None


# --- addresses ---------------------------------------------------------------------------------------------


def test_addresses() -> None:
    assert parse_address("s3://some-bucket/a/b/") == Address("some-bucket", "a/b")
    assert str(parse_address("s3://some-bucket/a/b/")) == "s3://some-bucket/a/b"
    assert parse_address("s3://some-bucket").child("x") == Address("some-bucket", "x")
    for wrong in (
        "some-bucket/a",
        "https://host/x",
        "s3://",
        "s3://B/x",
        "s3://some-bucket/a/../b",
        "s3://abc//a",
    ):
        with pytest.raises(InputError, match="base_model"):
            parse_address(wrong, "model.base_model")


def test_an_address_with_credentials_in_it_is_refused_without_repeating_them() -> None:
    for wrong in (f"s3://key:{SECRET_KEY}@bucket/a", f"https://host/a?X-Amz-Signature={SECRET_KEY}"):
        with pytest.raises(InputError) as error:
            parse_address(wrong)
        one_line(error)


# --- publishing and reading --------------------------------------------------------------------------------


def test_a_folder_comes_back_as_it_was(
    tmp_path: Path, address: Address, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "source")
    (source / ".cache").mkdir()
    (source / ".cache" / "junk").write_text("stays here")
    assert not exists(address)
    plain = upload_folder(source, address, connect())
    assert exists(address)
    names = download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(source)
    assert sorted(names) == sorted(contents(source))
    assert list_files(address) == {name: (source / name).stat().st_size for name in names}
    # Any other client finds an ordinary folder at the address that was returned.
    download_folder(parse_address(plain), tmp_path / "plain", connect())
    assert contents(tmp_path / "plain") == contents(source)
    printed = capsys.readouterr().out
    for label in ("uploading", "downloading"):
        last = [line for line in printed.splitlines() if f" {label} {address}, MiB" in line][-1]
        assert last.startswith("progress: 13/13 ")


def test_a_second_transfer_of_the_same_moves_nothing(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "source")
    upload_folder(source, address, connect())
    download_folder(address, tmp_path / "target", connect())
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        upload_folder(source, address, connect())
        written = [request for request in proxy.requests if request.method in ("PUT", "POST")]
        assert [request.path.rpartition("/")[2] for request in written] == ["_manifest.json"]
        proxy.requests.clear()
        download_folder(address, tmp_path / "target", connect())
        assert all("_manifest.json" in request.path for request in proxy.requests)
    point_at(monkeypatch, server.endpoint)
    # A file that was changed on disk is fetched anew.
    (tmp_path / "target" / "config.json").write_text("edited")
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(source)


def test_publishing_anew_replaces_the_folder_as_a_whole(
    tmp_path: Path, address: Address, server: Server
) -> None:
    first, second = make_folder(tmp_path / "first", 1, MIB), make_folder(tmp_path / "second", 2, MIB)
    (first / "only-in-the-first.txt").write_text("old")
    upload_folder(first, address, connect())
    download_folder(address, tmp_path / "target", connect())
    old = list_files(address)
    upload_folder(second, address, connect())
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(second)
    assert "only-in-the-first.txt" in old
    backing = server.folder / BUCKET / address.key
    assert len(list(backing.glob("_files-*"))) == 2, "the version before stays for those who still read it"
    third = make_folder(tmp_path / "third", 3, MIB)
    upload_folder(third, address, connect())
    assert len(list(backing.glob("_files-*/config.json"))) == 2, "older ones are removed"
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(third)


def test_a_reader_overtaken_by_publishers_gets_one_version_and_no_mixture(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [make_folder(tmp_path / str(seed), seed) for seed in range(3)]
    upload_folder(versions[0], address, connect())
    overtaken = threading.Event()

    def publish_twice(request: Request) -> None:
        # The reader has its manifest and asks for the first file: its version is removed under its hands.
        if "_files-" in request.path and not overtaken.is_set():
            overtaken.set()
            for folder in versions[1:]:
                upload_folder(folder, address, direct)

    direct = connect()
    with Proxy(server.port, publish_twice) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        download_folder(address, tmp_path / "target", connect(workers=1))
    assert overtaken.is_set()
    assert contents(tmp_path / "target") == contents(versions[2])


def test_a_half_published_folder_is_not_readable(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "source")
    refused = Fault("refuse", 403, "AccessDenied")
    with Proxy(
        server.port, lambda r: refused if r.method == "PUT" and "_manifest.json" in r.path else None
    ) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        with pytest.raises(InputError, match="s3:PutObject"):
            upload_folder(source, address, connect())
    point_at(monkeypatch, server.endpoint)
    assert list((server.folder / BUCKET / address.key).glob("_files-*/model.bin")), "the files did arrive"
    assert not exists(address)
    for read in (
        lambda: download_folder(address, tmp_path / "target", connect()),
        lambda: list_files(address),
        lambda: S3Tensors(address),
    ):
        with pytest.raises(InputError, match="upload has not finished"):
            read()
    upload_folder(source, address, connect())
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(source)


def test_a_folder_that_somebody_else_uploaded(tmp_path: Path, address: Address, server: Server) -> None:
    source = make_folder(tmp_path / "source")
    server.put_plain(source, address.key)
    target = tmp_path / "target"
    download_folder(address, target, connect())
    assert contents(target) == contents(source)
    make_folder(source, seed=9)
    server.put_plain(source, address.key)
    download_folder(address, target, connect())
    assert contents(target) == contents(source), "changed objects of the same size are fetched anew"


def test_a_target_with_other_files_in_it_is_refused(tmp_path: Path, address: Address) -> None:
    upload_folder(make_folder(tmp_path / "source", large=10), address, connect())
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"mine\.txt"):
        download_folder(address, target, connect())
    assert contents(target).keys() == {"mine.txt"}


@pytest.mark.parametrize("single", [True, False])
def test_a_local_copy_is_kept_and_follows_the_store(
    single: bool, tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = make_folder(tmp_path / "source", large=MIB)

    def publish() -> None:
        if single:
            upload_file(source / "config.json", address, connect())
        else:
            upload_folder(source, address, connect())

    def copied() -> object:
        path = local_copy(address, content_digest(address, connect()), connect())
        return path.read_bytes() if single else contents(path)

    def expected() -> object:
        return (source / "config.json").read_bytes() if single else contents(source)

    publish()
    before = content_digest(address, connect())
    assert copied() == expected()
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint.replace("127.0.0.1", "localhost"))
        assert copied() == expected(), "another endpoint is another store"
        moved = proxy.body_bytes
        assert copied() == expected()
        assert proxy.body_bytes - moved < 10_000, "what is there is not fetched again"
    point_at(monkeypatch, server.endpoint)
    (source / "config.json").write_text("other")
    publish()
    with pytest.raises(InputError, match="replaced since"):
        local_copy(address, before, connect())
    assert copied() == expected()


def test_a_file_beside_a_model_that_somebody_else_uploaded_changes_nothing(
    tmp_path: Path, address: Address, server: Server, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectraqlora.places import base_place, data_place

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.put_plain(tiny_model, address.key)
    model, data = base_place(str(address)), data_place(str(address))
    before, all_before = model.digest(), data.digest()
    for name in ("notes.txt", "onnx/model.onnx", "onnx/config.json"):
        put(address.child(name), b"{}")
    assert model.digest() == before and data.digest() != all_before
    names = {path.name for path in model.local_copy(before).iterdir()} - {".cache"}
    assert names == {path.name for path in tiny_model.iterdir()}
    put(address.child("chat_template.jinja"), b"{{ messages }}")
    assert model.digest() != before


def put(address: Address, content: bytes) -> None:
    connect().call("put_object", address, Key=address.key, Body=content)


def publish_manifest(names: dict[str, bytes], address: Address) -> str:
    """The manifest of a folder that somebody else who may write to the bucket publishes; returns its version."""
    entries = {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in names.items()}
    table = "".join(f"{n}\0{e['size']}\0{e['sha256']}\n" for n, e in sorted(entries.items()))
    version = hashlib.sha256(table.encode()).hexdigest()[:16]
    document = {"schema_version": 1, "version": version, "files": entries}
    put(address.child("_manifest.json"), json.dumps(document).encode())
    return version


def publish_as(names: dict[str, bytes], address: Address) -> None:
    """A folder with these files, as somebody else publishes it."""
    version = publish_manifest(names, address)
    for name, content in names.items():
        put(address.child(f"_files-{version}/{name}"), content)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["../../escaped"], "segments"),
        (["/etc/escaped"], "absolute"),
        (["sub//escaped"], "segments"),
        (["./escaped"], "segments"),
        ([".cache/downloaded.json"], "downloads keep their records"),
        ([".Cache/x"], "downloads keep their records"),
        (["a\x1b[31m"], "control characters"),
        (["a\nb"], "control characters"),
        (["a\x85b"], "control characters"),
        (["..\\escaped"], "backslash"),
        (["x" * 300], "255 bytes"),
        (["config.json", "Config.json"], "in case alone"),
        (["a", "a/b"], "a folder of others"),
        (["A", "a/b/c"], "a folder of others"),
        ([""], "empty"),
    ],
)
def test_names_that_lead_out_of_the_folder_or_clash_are_refused(
    names: list[str], words: str, tmp_path: Path, address: Address
) -> None:
    publish_manifest(dict.fromkeys(names, b"1"), address)  # A file system to publish from has no such files.
    with pytest.raises(InputError, match=f"inside its folder.*{words}") as error:
        download_folder(address, tmp_path / "a" / "b" / "target", connect())
    one_line(error)
    assert not list(tmp_path.rglob("escaped"))


def test_a_record_that_names_files_elsewhere_removes_none(tmp_path: Path, address: Address) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    publish_as({"a/b": b"1"}, address)
    target = tmp_path / "target"
    download_folder(address, target, connect())
    record = target / ".cache" / "downloaded.json"
    document = json.loads(record.read_text())
    record.write_text(json.dumps({**document, "../precious.txt": [0], str(precious): [0]}))
    publish_as({"a/c": b"2"}, address)
    download_folder(address, target, connect())
    assert precious.read_text() == "precious"
    assert contents(target).keys() == {"a/c"}


def test_a_file_may_take_the_place_of_a_folder_and_a_folder_that_of_a_file(
    tmp_path: Path, address: Address
) -> None:
    target = tmp_path / "target"
    for names in ({"a/b": b"1", "c": b"2"}, {"a": b"3", "c/d/e": b"4"}, {"a/b": b"5", "c/d": b"6"}):
        publish_as(names, address)
        for _ in range(2):
            assert sorted(download_folder(address, target, connect())) == sorted(names)
            assert contents(target) == {n: hashlib.sha256(c).hexdigest() for n, c in names.items()}


def test_an_interrupted_download_of_a_folder_gives_way_to_a_file_of_its_name(
    tmp_path: Path, address: Address
) -> None:
    target = tmp_path / "target"
    (target / ".cache" / "downloading" / "a").mkdir(parents=True)
    (target / ".cache" / "downloading" / "a" / "b.journal").write_text("{}")
    (target / ".cache" / "downloading" / "c").write_bytes(b"half")
    publish_as({"a": b"1", "c/d": b"2"}, address)
    download_folder(address, target, connect())
    assert contents(target).keys() == {"a", "c/d"}


def test_a_link_in_the_target_is_not_followed(tmp_path: Path, address: Address) -> None:
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "target"
    elsewhere.mkdir()
    target.mkdir()
    (target / "a").symlink_to(elsewhere)
    publish_as({"a/b": b"1"}, address)
    with pytest.raises(InputError, match="no link"):
        download_folder(address, target, connect())
    assert not list(elsewhere.iterdir())


def test_a_manifest_that_was_cut_or_changed_is_refused(
    tmp_path: Path, address: Address, server: Server
) -> None:
    upload_folder(make_folder(tmp_path / "source", large=10), address, connect())
    path = server.folder / BUCKET / address.key / "_manifest.json"
    whole = path.read_text()
    for damaged in (whole[: len(whole) // 2], whole.replace('"size": 700', '"size": 701')):
        path.write_text(damaged)
        server.forget()
        with pytest.raises(InputError, match="manifest") as error:
            download_folder(address, tmp_path / "target", connect())
        one_line(error)


def test_single_files(tmp_path: Path, address: Address) -> None:
    source = make_folder(tmp_path / "source") / "model.bin"
    where = address.child("data.bin")
    with pytest.raises(InputError, match="none"):
        download_file(where, tmp_path / "copy", connect())
    upload_file(source, where, connect())
    assert exists(where)
    download_file(where, tmp_path / "copy", connect())
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    source.write_bytes(source.read_bytes()[:-5] + b"other")
    upload_file(source, where, connect())
    download_file(where, tmp_path / "copy", connect())
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


# --- damage ------------------------------------------------------------------------------------------------


def flip(server: Server, path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    server.forget()


def test_a_damaged_object_is_named_after_a_second_try(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(make_folder(tmp_path / "source"), address, connect())
    (stored,) = (server.folder / BUCKET / address.key).glob("_files-*/model.bin")
    flip(server, stored, 7 * MIB)
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        with pytest.raises(InputError, match=r"_files-.*/model\.bin.*SHA-256") as error:
            download_folder(address, tmp_path / "target", connect())
        one_line(error)
        assert sum("model.bin" in request.path for request in proxy.requests) == 6, "three parts, twice"
    assert contents(tmp_path / "target") == {}, "nothing that is wrong gets its name"
    flip(server, stored, 7 * MIB)
    point_at(monkeypatch, server.endpoint)
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(tmp_path / "source")


def test_an_object_that_is_shorter_than_the_manifest_says(
    tmp_path: Path, address: Address, server: Server
) -> None:
    upload_folder(make_folder(tmp_path / "source"), address, connect())
    (stored,) = (server.folder / BUCKET / address.key).glob("_files-*/model.bin")
    os.truncate(stored, 11 * MIB)
    server.forget()
    with pytest.raises(InputError, match=r"model\.bin"):
        download_folder(address, tmp_path / "target", connect())


# --- faults on the way -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["refuse", "drop", "cut", "lose"])
def test_transfers_survive_faults(
    kind: str, tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "source")
    fault = Fault(kind)  # type: ignore[arg-type]
    faults = []

    def every_fifth(request: Request) -> Fault | None:
        if request.number % 5 != 4:
            return None
        faults.append(request)
        return fault

    with Proxy(server.port, every_fifth) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        upload_folder(source, address, connect())
        download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(source)
    assert len(faults) >= 4


def test_a_lost_answer_to_the_last_request_of_an_upload(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is complete, the upload is gone, and a second completion is refused."""
    source = make_folder(tmp_path / "source")
    lost: list[Request] = []

    def lose(request: Request) -> Fault | None:
        if request.method == "POST" and re.search(r"uploadId=", request.path) and not lost:
            lost.append(request)
            return Fault("lose")
        return None

    with Proxy(server.port, lose) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        upload_folder(source, address, connect())
    assert lost
    point_at(monkeypatch, server.endpoint)
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(source)


def test_a_server_that_is_away_for_some_seconds(
    tmp_path: Path, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(tmp_path / "s3") as server:
        point_at(monkeypatch, server.endpoint)
        source = make_folder(tmp_path / "source")
        upload_folder(source, address, connect())
        with Proxy(server.port, bytes_per_second=8 * MIB) as proxy:
            point_at(monkeypatch, proxy.endpoint)
            restarted = threading.Event()

            def restart() -> None:
                while proxy.body_bytes < 2 * MIB:
                    time.sleep(0.01)
                server.stop()
                time.sleep(3)
                server.start()
                restarted.set()

            threading.Thread(target=restart).start()
            download_folder(address, tmp_path / "target", connect(workers=2))
            assert restarted.is_set()
    assert contents(tmp_path / "target") == contents(source)


# --- resuming ----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from spectraqlora.storage import Connection, download_folder, parse_address, upload_folder
verb, folder, address, part = sys.argv[1:]
connection = Connection(workers=2, part_bytes=int(part))
if verb == "up":
    upload_folder(Path(folder), parse_address(address), connection)
else:
    download_folder(parse_address(address), Path(folder), connection)
"""


def kill_midway(verb: str, folder: Path, address: Address, endpoint: str, midway: Callable[[], bool]) -> None:
    """Run a transfer in a process of its own, and SIGKILL it as soon as `midway()`."""
    components = str(Path(spectraqlora.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, verb, str(folder), str(address), str(PART)],
        env={**os.environ, **environment(endpoint), "PYTHONPATH": components},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not midway():
        assert process.poll() is None and time.monotonic() < deadline, "ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()


def test_a_killed_download_goes_on_where_it_was(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "source", large=40 * MIB + 17)
    target = tmp_path / "target"
    upload_folder(source, address, connect())
    with Proxy(server.port, bytes_per_second=20 * MIB) as proxy:
        kill_midway("down", target, address, proxy.endpoint, lambda: proxy.body_bytes > 24 * MIB)
    assert contents(target) == {}, "no file has its name before the folder is whole"
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        download_folder(address, target, connect())
        # 24 MiB had come; two parts of 5 MiB may have been under way.
        assert proxy.body_bytes < 27 * MIB
    assert contents(target) == contents(source)


def test_a_killed_download_of_what_has_changed_since_starts_over(
    tmp_path: Path, address: Address, server: Server
) -> None:
    source = make_folder(tmp_path / "source", large=20 * MIB)
    server.put_plain(source, address.key)
    target = tmp_path / "target"
    with Proxy(server.port, bytes_per_second=10 * MIB) as proxy:
        kill_midway("down", target, address, proxy.endpoint, lambda: proxy.body_bytes > 12 * MIB)
    assert "\n0\n" in (target / ".cache/downloading/model.bin.journal").read_text()
    make_folder(source, seed=5, large=20 * MIB)
    server.put_plain(source, address.key)
    download_folder(address, target, connect())
    assert contents(target) == contents(source)


def test_a_killed_upload_goes_on_where_it_was(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "source", large=40 * MIB + 17)
    (source / "a.bin").write_bytes(random.Random(1).randbytes(2 * MIB))

    def parts(proxy: Proxy) -> list[str]:
        with proxy.lock:
            return [request.path for request in proxy.requests if "partNumber=" in request.path]

    def slowly(request: Request) -> None:
        if "partNumber=" in request.path:
            time.sleep(0.2)

    with Proxy(server.port, slowly) as proxy:
        kill_midway("up", source, address, proxy.endpoint, lambda: len(parts(proxy)) >= 6)
    time.sleep(0.3)  # What the proxy still held has reached the server, or never will.
    assert not exists(address)
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        upload_folder(source, address, connect())
        assert 0 < len(parts(proxy)) <= 5, "nine parts, at least four of which had arrived"
        assert not [r for r in proxy.requests if r.method == "PUT" and "a.bin" in r.path]
    point_at(monkeypatch, server.endpoint)
    download_folder(address, tmp_path / "target", connect())
    assert contents(tmp_path / "target") == contents(source)


# --- errors ------------------------------------------------------------------------------------------------


def fails(action: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        action()
    one_line(error)


@pytest.mark.parametrize("verb", ["download", "upload", "open"])
def test_a_wrong_secret_is_told_at_once(
    verb: str, tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(make_folder(tmp_path / "source"), address, connect())
    actions: dict[str, Callable[[], object]] = {
        "download": lambda: download_folder(address, tmp_path / "target", connect()),
        "upload": lambda: upload_folder(tmp_path / "source", address, connect()),
        "open": lambda: S3Tensors(address, connect()),
    }
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint, secret="not-the-secret")
        fails(actions[verb], "AWS_SECRET_ACCESS_KEY")
        assert len(proxy.requests) == 1


def test_what_is_missing_is_told_apart(tmp_path: Path, address: Address, server: Server) -> None:
    nobody = parse_address("s3://no-such-bucket/x")
    fails(lambda: download_folder(nobody, tmp_path / "a", connect()), "bucket that exists")
    fails(
        lambda: upload_folder(make_folder(tmp_path / "f", large=9), nobody, connect()), "bucket that exists"
    )
    fails(lambda: exists(nobody), "bucket that exists")
    fails(lambda: download_folder(address, tmp_path / "b", connect()), "there are none")
    fails(lambda: ranged_reader(address.child("x"), connect()), r"none \(404\)")
    fails(lambda: upload_folder(tmp_path / "nowhere", address, connect()), "existing folder")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "s3:GetObject.*403"),
        (403, "InvalidAccessKeyId", "access key that the store knows"),
        (403, "RequestTimeTooSkewed", "clock"),
        (400, "AuthorizationHeaderMalformed", "AWS_REGION"),
        (400, "ExpiredToken", "expired"),
    ],
)
def test_refusals_are_one_line_and_not_repeated(
    status: int,
    code: str,
    words: str,
    tmp_path: Path,
    address: Address,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Proxy(server.port, lambda _: Fault("refuse", status, code)) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        fails(lambda: download_folder(address, tmp_path / "target", connect()), words)
        assert len(proxy.requests) <= 2


def test_a_refusal_in_the_middle_stops_all_workers(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(make_folder(tmp_path / "source", large=60 * MIB), address, connect())
    refused = Fault("refuse", 403, "AccessDenied")
    with Proxy(server.port, lambda r: refused if "model.bin" in r.path else None) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        fails(lambda: download_folder(address, tmp_path / "target", connect(workers=2)), "s3:GetObject")
        assert sum("model.bin" in request.path for request in proxy.requests) <= 6, "of twelve parts"


def test_an_endpoint_that_is_not_there(
    tmp_path: Path, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    point_at(monkeypatch, f"http://user:{SECRET_KEY}@127.0.0.1:{port}")
    began = time.monotonic()
    fails(lambda: download_folder(address, tmp_path / "target", connect(patience_s=10)), f"127.0.0.1:{port}")
    assert time.monotonic() - began < 15
    point_at(monkeypatch, "no-url")
    fails(lambda: download_folder(address, tmp_path / "target", connect()), "AWS_ENDPOINT_URL")


def test_a_store_that_stays_away_is_given_up(
    tmp_path: Path, address: Address, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(make_folder(tmp_path / "source", large=10), address, connect())
    with Proxy(server.port, lambda r: Fault("refuse") if "_files-" in r.path else None) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        fails(
            lambda: download_folder(address, tmp_path / "target", connect(patience_s=1)), r"SlowDown \(503\)"
        )


def test_missing_credentials(tmp_path: Path, address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fails(lambda: download_folder(address, tmp_path / "target", connect()), "credentials: AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    fails(lambda: download_folder(address, tmp_path / "target", connect()), "profile")


# --- reading parts -----------------------------------------------------------------------------------------


def test_ranged_reads(tmp_path: Path, address: Address, server: Server) -> None:
    source = make_folder(tmp_path / "source") / "model.bin"
    upload_file(source, address, connect())
    reader, content = ranged_reader(address, connect()), source.read_bytes()
    assert reader.size == len(content)
    for offset, length in ((0, 8), (123, 0), (PART - 3, 7), (MIB, 11 * MIB), (len(content) - 5, 5)):
        assert reader.read(offset, length) == content[offset : offset + length]
    fails(lambda: reader.read(len(content) - 5, 6), str(len(content)))
    flip(server, server.folder / BUCKET / address.key, 0)
    fails(lambda: reader.read(0, 8), "does not change")


@pytest.mark.parametrize("published", [True, False])
def test_a_checkpoint_is_read_without_a_copy(
    published: bool,
    tmp_path: Path,
    address: Address,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from safetensors.torch import save_file
    from spectraqlora.models.tensors import LocalTensors

    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    shards = {
        "model-1.safetensors": {
            "large": torch.randn(2048, 1024),
            "half": torch.randn(7, 5, dtype=torch.bfloat16),
            "scalar": torch.tensor(3.0),
            "none": torch.empty(0, 4),
        },
        # A header longer than what is fetched at first.
        "model-2.safetensors": {f"{'long' * 20}.{i}": torch.full((3,), i) for i in range(1000)},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    index = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({"not-of-the-model": torch.ones(1)}, folder / "adapter.safetensors")
    if published:
        upload_folder(folder, address, connect())
    else:
        server.put_plain(folder, address.key)
    local = LocalTensors(folder)
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        remote = S3Tensors(address, connect())
        assert proxy.body_bytes < MIB
        assert sorted(remote.names()) == sorted(local.names())
        for name in ("large", "half", "scalar", "none", f"{'long' * 20}.999"):
            assert remote.shape(name) == local.shape(name)
            loaded = remote.load(name)
            assert loaded.dtype == local.load(name).dtype
            assert torch.equal(loaded, local.load(name))
        assert proxy.body_bytes < 10 * MIB


def test_checkpoints_that_must_be_refused(
    tmp_path: Path, address: Address, server: Server, tiny_model: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    server.put_plain(folder, address.key)
    fails(lambda: S3Tensors(address), "no \\*.safetensors")
    whole = (tiny_model / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    server.put_plain(folder, address.key)
    fails(lambda: S3Tensors(address), r"model\.safetensors.*truncated")
    (folder / "model.safetensors").write_bytes(whole[:100])
    server.put_plain(folder, address.key)
    fails(lambda: S3Tensors(address), "cut short")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "gone.safetensors"}})
    )
    server.put_plain(folder, f"{address.key}/indexed")
    fails(lambda: S3Tensors(address.child("indexed")), r"gone\.safetensors")
