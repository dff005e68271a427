"""Retraining on one machine, three times in a row with changing data."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.sample.make import ensure_sample
from spectraqlora.settings import TrackingSettings
from spectraqlora.tracking.registry import Registry
from spectraqlora_pipelines.local.outputs import read_outputs

from tests.integration.test_dag import spectraqlora

pytestmark = pytest.mark.e2e


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def sample() -> Path:
    """The offline sample: a model that can learn, so that more data really is better."""
    return ensure_sample()


def rows_of(sample: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (sample / "data.jsonl").read_text().splitlines()]


class Retraining:
    """`spectraqlora run --pipeline retraining` on one workdir."""

    def __init__(self, model: Path, folder: Path, *settings: str) -> None:
        self.data, self.workdir = folder / "rows.jsonl", folder / "work"
        self._arguments = [
            "run", "--pipeline", "retraining", "--base-model", str(model), "--data", str(self.data),
            "--workdir", str(self.workdir), "--max-steps", "120", "--set", "train.learning_rate=4e-3",
            # Half of the rows judge: of a few rows, few would say nothing.
            "--set", "data.eval_fraction=0.5", "--set", "data.test_fraction=0",
            "--set", "retrain.method=qlora", "--set", "select.rank=8", "--set", "evaluate.accuracy_rows=0",
            "--set", "promote.margin=0.02", *(part for text in settings for part in ("--set", text)),
        ]  # fmt: skip

    def __call__(self, *more: str) -> dict[str, Any]:
        done = spectraqlora(*self._arguments, *more, timeout=3000)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((self.workdir / "summary.json").read_text())

    def champion(self) -> int:
        settings = TrackingSettings(uri=f"sqlite:///{self.workdir}/mlflow.db")
        return Registry(settings).version("champion").number


def test_better_same_and_worse_data_find_the_right_champion(sample: Path, tmp_path: Path) -> None:
    rows = rows_of(sample)
    retrain = Retraining(sample / "model", tmp_path)

    _write(retrain.data, rows[:40])
    first = retrain()
    assert first["changes"]["changed"] and first["promotion"]["decision"] == "promoted"
    assert retrain.champion() == 1

    # The clock was ahead during the first run, and is right again in the second.
    for path in (retrain.workdir / "artifacts").rglob("*"):
        os.utime(path, (time.time() + 172_800,) * 2, follow_symlinks=False)
    _write(retrain.data, rows)
    better = retrain()
    assert better["registered"]["version"] == 2
    assert better["data"]["train_rows"] > 4 * first["data"]["train_rows"]
    assert (retrain.workdir / "merged" / "README.md").read_bytes() == (
        read_outputs(retrain.workdir).path("merge-export", "exported") / "merged" / "README.md"
    ).read_bytes()
    assert "data changed" in better["changes"]["reason"]
    assert better["promotion"]["decision"] == "promoted" and better["promotion"]["against"] == 1
    assert "again" in better["promotion"]["scored"], "their eval rows differ"
    assert retrain.champion() == 2

    same = retrain()
    assert not same["changes"]["changed"] and "nothing changed" in same["changes"]["reason"]
    report = spectraqlora("report", str(retrain.workdir))
    assert report.returncode == 0, "the report is that of the run before, which trained"
    assert retrain.champion() == 2

    # A twentieth of the rows is left: who learns from so few is worse than the champion, on the same rows.
    _write(retrain.data, rows[100:120])
    worse = retrain()
    numbers = [worse["promotion"][side]["merged_eval_loss"] for side in ("challenger", "champion")]
    assert numbers[0] > numbers[1]
    assert worse["promotion"]["decision"] == "not promoted" and worse["promotion"]["against"] == 2
    assert retrain.champion() == 2
    assert "not promoted" in retrain()["changes"]["reason"], "the same data is not tried again"


@pytest.mark.soak
def test_retraining_starts_from_the_champions_adapter(sample: Path, tmp_path: Path) -> None:
    rows = rows_of(sample)
    retrain = Retraining(sample / "model", tmp_path, "retrain.start=champion", "train.max_steps=20")
    _write(retrain.data, rows[:200])
    retrain()
    log = (retrain.workdir / "run.log").read_text()
    assert "training starts from the base: there is no champion" in log
    _write(retrain.data, rows)
    second = retrain()
    log = (retrain.workdir / "run.log").read_text()
    assert "training starts from the adapter of the champion, version 1" in log
    adapter = read_outputs(retrain.workdir).path("train (qlora, round 1)", "adapter")
    curve = json.loads((adapter / "training.json").read_text())["eval_curve"]
    base = second["base"]["eval_loss"]
    assert curve[0][0] == 0 and curve[0][1] < base, "step 0 is the champion's adapter, not the base"
