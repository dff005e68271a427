"""What an artifact in a bucket says that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from spectraqlora.errors import InputError
from spectraqlora.files import write_text
from spectraqlora.runtime.step import MADE_FROM, output_folder, step


def artifact(folder: Path, name: str, scheme: str = "minio://bucket/") -> Any:
    return SimpleNamespace(uri=f"{scheme}{name}", path=str(folder / name))


@step
def work(*, count: int, rows: Any, previous: Any, adapter: Any, report: Any) -> None:
    write_text(output_folder(adapter) / "weights", "x" * count)
    write_text(Path(report.path), "<html>")
    if count > 1:
        raise InputError("count", count, "1")


def test_outputs_in_a_bucket_say_what_they_were_made_from(tmp_path: Path) -> None:
    given = {name: artifact(tmp_path, name) for name in ("rows", "adapter", "report")}
    work(count=1, previous=None, **given)
    document = json.loads((tmp_path / "adapter" / MADE_FROM).read_text())
    assert (
        "minio://bucket/rows" in document["made_from"]
        and "minio://bucket/adapter" not in document["made_from"]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "report"}, "inputs are left alone"


def test_on_this_machine_and_after_a_refusal_nothing_is_written(tmp_path: Path) -> None:
    given = {name: artifact(tmp_path, name, "/") for name in ("rows", "adapter", "report")}
    work(count=1, previous=None, **given)
    assert not (tmp_path / "adapter" / MADE_FROM).exists()
    remote = {name: artifact(tmp_path, name) for name in ("rows", "adapter", "report")}
    with pytest.raises(SystemExit):
        work(count=2, previous=None, **remote)
    assert not (tmp_path / "adapter" / MADE_FROM).exists()
