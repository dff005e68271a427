"""The GPU check's own logic: what travels, what a cut-off leaves, and what its tables say."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import check, wheels
from tests.gpu.table import markdown, targets

GIB = 2**30


def test_a_reduced_wheel_keeps_what_is_asked_for_and_a_record_of_it(tmp_path: Path) -> None:
    wheel, site = tmp_path / "bitsandbytes-1-py3-none-any.whl", tmp_path / "site"
    record = "bitsandbytes-1.dist-info/RECORD"
    kept = ["bitsandbytes/__init__.py", *(f"bitsandbytes/{name}" for name in wheels.LIBRARIES)]
    names = [*kept, "bitsandbytes/libbitsandbytes_cuda118.so"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, name)
        archive.writestr(record, "".join(f"{name},sha256=0,1\n" for name in names))
    wheels.reduce(wheel, wheels.other_libraries)
    wheels.unpack(tmp_path, site)
    unpacked = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert unpacked == {*kept, record}
    assert (site / record).read_text() == "".join(f"{name},sha256=0,1\n" for name in kept)


def test_of_botocore_only_s3_is_kept() -> None:
    assert wheels.other_services("botocore/data/ec2/2016-11-15/service-2.json.gz")
    assert not wheels.other_services("botocore/data/s3/2006-03-01/service-2.json.gz")
    assert not wheels.other_services("botocore/data/endpoints.json")


PARTS = {
    "ends": "",
    "lasts": "    time.sleep(600)",
    "fails": "    raise SystemExit('no such card')",
    "imports": "    sys.modules['kfp'] = None",
}
"""What a part does after it has recorded its first row."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> check.Check:
    """A check of these parts."""
    for name, rest in PARTS.items():
        lines = ["import sys, time", "from tests.gpu.record import part", "with part(None) as given:"]
        lines += ["    given.record.add('rows', {'of': given.record.path.stem})", rest]
        (tmp_path / f"part_{name}.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = [check.Part(name, f"part_{name}", 3 if name == "lasts" else 60) for name in PARTS]
    monkeypatch.setattr(check, "PREPARE", made[0])
    monkeypatch.setattr(check, "PARTS", tuple(made[1:]))
    for name in ("scratch", "results"):
        (tmp_path / name).mkdir()
    options = argparse.Namespace(device="cpu", small=False, seconds=check.TOTAL, carried=tmp_path / "none")
    return check.Check(options, tmp_path / "scratch", tmp_path / "site", tmp_path / "results")


def test_what_every_part_reached_stays_whether_it_ends_is_cut_off_or_fails(run: check.Check) -> None:
    assert not run.run()
    results = run.results
    content = json.loads((results / "results.json").read_text())
    assert {name: entry["outcome"] for name, entry in content["parts"].items()} == {
        "ends": "done", "lasts": "cut off", "fails": "failed with 1", "imports": "failed with 1",
    }  # fmt: skip
    assert [content[name]["rows"] for name in PARTS] == [[{"of": name}] for name in PARTS]
    assert "no such card" in content["parts"]["fails"]["log"]
    assert "imported kfp" in content["parts"]["imports"]["log"]
    assert "| lasts | cut off | 3 |" in (results / "table.md").read_text()


def test_a_part_ends_with_the_check_that_started_it(run: check.Check) -> None:
    lasts = check.PARTS[0]
    process = run.start(lasts, run.environment)
    run.begin(process, 60)
    deadline = time.monotonic() + 30
    while not (run.scratch / "lasts.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None and process.stdin
    process.stdin.close()
    assert process.wait(timeout=30) == 1


def _found(speed: float, memory: float, plan: float, scan: float) -> dict[str, Any]:
    """Results of a check whose hybrid-25 has this speed and memory against the peer's."""

    def row(side: str, tokens: float, peak: float) -> dict[str, Any]:
        return {
            "stage": "complete", "side": side, "batch": 1, "seconds": 1.0, "trained_parameters": 10,
            "tokens_per_second": tokens, "peak_bytes": peak * GIB,
        }  # fmt: skip

    rows = [row("peft", 1000, 10), row("qlora", 1000, 9), row("hybrid-25", 1000 * speed, 10 * memory)]
    plans = [
        {"stage": "complete", "side": r["side"], "batch": 1, "total": plan * r["peak_bytes"]}
        for r in rows[1:]
    ]
    reference = {"shape": [8, 8], "matrices": 2, "seconds": scan, "peak_bytes": 1, "relative_difference": 0.0}
    return {
        "card": "a card", "card_bytes": 80 * GIB, "python": "3.12", "cuda": "13.0", "parts": {},
        "scan": {"scan": {"matrices": 2, "seconds": 2.0, "peak_bytes": GIB}, "svdvals": [reference]},
        "training": {"rows": rows}, "prepare": {"plans": plans},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "reached"),
    [
        ((1.3, 0.8, 1.2, 10.0), [True, True, True, True, True]),
        ((1.2, 0.9, 0.9, 9.0), [False, False, True, False, False]),
    ],
)
def test_the_targets_are_judged_at_their_worst(
    numbers: tuple[float, float, float, float], reached: list[bool]
) -> None:
    found = _found(*numbers)
    assert [is_reached for _, _, is_reached in targets(found)] == reached
    text = markdown(found)
    speed, memory, plan, _ = numbers
    line = f"| complete | 1 | hybrid-25 | 10 | {1000 * speed:,.0f} | {speed:.2f} | {10 * memory:.2f} | {memory:.2f} |"
    assert f"{line} {10 * memory * plan:.2f} | {plan:.2f} |" in text
    assert f"svdvals takes {numbers[3]:.1f} times as long" in text


def test_nothing_is_compared_before_it_was_measured() -> None:
    found = _found(1.3, 0.8, 1.2, 10.0)
    found["scan"]["svdvals"] = []
    del found["prepare"], found["training"]["rows"][0]
    assert targets(found) == []
    assert "| complete | 1 | hybrid-25 | 10 | 1,300 |  | 8.00 |  |  |  |" in markdown(found)


LATE = """
import os, time
from tests.gpu import record

read = os.read
def late(file, count):
    time.sleep(0.5)
    return read(file, count)
os.read = late
with record.part(None):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    time.sleep(1.5)
"""
"""A part whose standard input is replaced, as pytest does it, before its guard has read from it."""


def test_a_part_goes_on_when_its_standard_input_is_replaced_and_not_when_the_check_has_ended(
    tmp_path: Path,
) -> None:
    for check_goes_on in (True, False):
        command = [sys.executable, "-c", LATE, "--work", str(tmp_path), "--record", str(tmp_path / "r.json")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=check.ROOT, text=True) as process:
            assert process.stdin
            process.stdin.write("60\n")
            process.stdin.flush()
            if not check_goes_on:
                process.stdin.close()
            assert process.wait(30) == (0 if check_goes_on else 1)
