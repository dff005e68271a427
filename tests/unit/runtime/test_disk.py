"""Disks that are too small: a real file system of few bytes, on which libraries write what they write."""

import json
import re
import sys
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.runtime.disk import ask, free_bytes, full, shown

from tests.disks import on_a_small_disk

WRITERS = """
import json, shutil, sqlite3, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from datasets import Dataset
from safetensors.torch import save_file
from spectraqlora.files import write_text
from spectraqlora.runtime.step import step

disk, source = Path(sys.argv[1]), Path(sys.argv[2])
large = torch.zeros(4 << 20, dtype=torch.uint8)
source.mkdir()
(source / "large").write_bytes(bytes(4 << 20))

def database(path):
    connection = sqlite3.connect(path)
    connection.execute("create table rows (content blob)")
    connection.execute("insert into rows values (zeroblob(4000000))")
    connection.commit()

def wrapped(path):
    try:
        path.write_bytes(bytes(4 << 20))
    except OSError:
        raise RuntimeError("the model was not saved")

writers = {
    "text": lambda path: write_text(path, "x" * (4 << 20)),
    "safetensors": lambda path: save_file({"large": large}, path),
    "rows": lambda path: Dataset.from_dict({"text": ["x" * 1000] * 4000}).save_to_disk(str(path)),
    "copy": lambda path: shutil.copytree(source, path),
    "sqlite": database,
    "wrapped": wrapped,
}

@step
def run(*, name, made):
    writers[name](Path(made.path))

for name in writers:
    try:
        run(name=name, made=SimpleNamespace(path=str(disk / name)))
        code = 0
    except SystemExit as ended:
        code = ended.code
    print(json.dumps([name, code]))
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
"""


def test_running_out_of_disk_is_one_line_whichever_library_wrote(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    done = on_a_small_disk(disk, "1m", sys.executable, "-c", WRITERS, str(disk), str(tmp_path / "source"))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    said, codes = lines[::2], dict(json.loads(line) for line in lines[1::2])
    assert set(codes.values()) == {2} and len(codes) == 6
    for line in said:
        assert line.startswith(f"error: disk: '{disk}"), line
        assert line.endswith("are left") and ": expected free space: " in line, line


QUANTIZE = """
import sys
from types import SimpleNamespace
from spectraqlora.steps.quantize_load.step import run
run(
    base_model=sys.argv[2], content="", model_settings={},
    four_bit=SimpleNamespace(path=sys.argv[1] + "/four_bit", metadata={}),
    outline=SimpleNamespace(path=sys.argv[1] + "/outline", metadata={}),
)
"""


def test_a_step_asks_for_its_room_before_it_writes(tiny_model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    done = on_a_small_disk(
        disk, "100k", sys.executable, "-W", "ignore", "-c", QUANTIZE, str(disk), str(tiny_model)
    )
    assert done.returncode == 2, done.stderr[-2000:]
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("error: "))
    wanted = rf"error: disk: '{disk}/four_bit': expected \d+\.\d KiB free for the 4-bit model; there are [\d.]+ KiB"
    assert re.fullmatch(wanted, said), said


def test_what_fits_is_not_refused_and_what_does_not_says_both_sizes(tmp_path: Path) -> None:
    ask(tmp_path / "not" / "there", free_bytes(tmp_path) // 2, "it")
    with pytest.raises(InputError, match=r"disk: '.*there': expected 8192.0 TiB free for it; there are .*B$"):
        ask(tmp_path / "not" / "there", 2**53, "it")
    assert [shown(size) for size in (0, 1023, 1536, 16 * 2**30)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "16.0 GiB",
    ]


@pytest.mark.parametrize(
    "error", [OSError(2, "No such file or directory", "x"), ValueError("full of errors")]
)
def test_other_errors_are_no_full_disk(error: Exception) -> None:
    assert full(error) is None
