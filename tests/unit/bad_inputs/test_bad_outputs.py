"""Places that cannot be written, for every option that writes: one line before the work, and nothing is left there."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bad_inputs import LINE, check_refused, command, written
from tests.disks import on_a_small_disk

VALUES = "defaults: {cpu: {request: 1}}\n"
FILES = {
    "compile --output": ["compile", "--output", "PATH"], "compile for Argo --output": ["compile", "--target", "argo", "--values", "VALUES", "--output", "PATH"],
    "data --html": ["data", "ROWS", "--base-model", "MODEL", "--html", "PATH"],
    "snr --output": ["snr", "MODEL", "--output", "PATH"], "snr --spectrum-json": ["snr", "MODEL", "--spectrum-json", "PATH"], "snr --unfrozen-yaml": ["snr", "MODEL", "--unfrozen-yaml", "PATH"],
}  # fmt: skip
RUN = ["run", "--base-model", "MODEL", "--data", "ROWS", "--workdir"]
FOLDERS = {
    "sample FOLDER": ["sample", "PATH"], "run --workdir": [*RUN, "PATH"], "run checkpoint.folder": [*RUN, "WORKDIR", "--set", "checkpoint.folder=PATH"],
}  # fmt: skip
OPTIONS = {**FILES, **FOLDERS}
PLACES = [
    "/proc/x", "/proc/1/x/y", "/sys/x", "/dev/null", "/dev/full", "/dev/null/x", "FILE/x", "FILE/a/b", "FIFO", "FIFO/x", "SOCKET", "SOCKET/x", "LOOP", "LOOP/x", "TO_FIFO",
    "n" * 300, "new/" + "n" * 300 + "/x", "d/" * 3000 + "x",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A path by its name in the tables."""
    folder = tmp_path / "places"
    written(folder / "FILE", "x")
    (folder / "FOLDER").mkdir()
    os.mkfifo(folder / "FIFO")
    (folder / "TO_FIFO").symlink_to("FIFO")
    (folder / "LOOP").symlink_to("LOOP")
    monkeypatch.chdir(folder)  # A socket's name must be short.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("SOCKET")
        yield lambda name: name if name.startswith("/") else str(folder / name)


def arguments(form: list[str], path: str, model: Path, rows: Path, tmp_path: Path) -> list[str]:
    values = written(tmp_path / "values.yaml", VALUES)
    given = {
        "MODEL": str(model), "ROWS": str(rows), "PATH": path, "VALUES": str(values), "WORKDIR": str(tmp_path / "run"),
    }  # fmt: skip
    return [re.sub("MODEL|ROWS|PATH|VALUES|WORKDIR", lambda found: given[found[0]], each) for each in form]


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *itertools.product(FILES, [*PLACES, "FOLDER"]),
        *itertools.product(FOLDERS, [*PLACES, "FILE"]),
    ],
    ids=lambda text: text[:20],
)
def test_a_place_that_cannot_be_written(
    option: str, name: str, place: Callable[[str], str], tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    given = arguments(OPTIONS[option], place(name), tiny_model, tiny_rows, tmp_path)
    before = tree(tmp_path)
    check_refused(command(*given), f"error: {option.split()[-1]}: ")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", [*FILES, "sample FOLDER", "run --workdir"])
def test_a_path_with_a_nul(option: str, tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    given = arguments(OPTIONS[option], f"{tmp_path}/a\0b", tiny_model, tiny_rows, tmp_path)
    check_refused(command(*given), f"(?i)error: {option.split()[-1]}: .*(NUL|null) ")


FULL_THEN_READ_ONLY = """
import json, os, subprocess, sys
from pathlib import Path
from tests.bad_inputs import command, ended

disk, forms = Path(sys.argv[1]), json.loads(sys.argv[2])
filler = disk / "filler"
with open(filler, "wb", buffering=0) as stream:
    try:
        while True:
            stream.write(bytes(512))
    except OSError:
        pass
for state in ("full", "read-only"):
    if state == "read-only":
        filler.write_bytes(b"")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for option, given in forms.items():
        if state == "full" and option == "run checkpoint.folder":
            continue  # What is on it is known to the step that writes there.
        ending = ended(command(*given))
        print(json.dumps([state, option, ending.code, ending.err, [str(path) for path in disk.rglob("*") if path.is_file()]]))
"""


@pytest.mark.e2e
def test_a_disk_that_is_full_or_read_only(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectraqlora.sample.make import VERSION

    cache = tmp_path / "cache"
    written(cache / "spectraqlora" / f"sample-v{VERSION}" / "data.jsonl", "{}\n" * 10_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    disk = tmp_path / "disk"
    forms = {
        option: arguments(form, str(disk / "out" / "x.yaml"), tiny_model, tiny_rows, tmp_path)
        for option, form in OPTIONS.items()
    }
    done = on_a_small_disk(
        disk, "64k", sys.executable, "-W", "ignore", "-c", FULL_THEN_READ_ONLY, str(disk), json.dumps(forms)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    endings = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(endings) == 2 * len(forms) - 1
    for state, option, code, said, left in endings:
        assert code == 2 and LINE.fullmatch(said), (state, option, code, said)
        field = "disk" if state == "full" else option.split()[-1]
        assert said.startswith(f"error: {field}: ") and str(disk) in said, (state, option, said)
        kept = [path for path in left if not path.endswith(".partial.jsonl")]  # What a scan resumes from.
        assert kept == [str(disk / "filler")], (state, option, left)
