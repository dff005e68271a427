"""gc reads a bucket's keys as Kubeflow Pipelines lays them out: the addresses here are what KFP 2.17.0 handed to steps."""

import json
import re
from pathlib import Path

from spectraqlora.storage import Address, Connection, ListedObject
from spectraqlora_pipelines.retention.bucket import Bucket

RECORDED = Path(__file__).parents[1] / "recorded"


def test_every_address_that_was_recorded_is_known_as_its_steps_artifact() -> None:
    text = "".join(path.read_text() for path in RECORDED.glob("executor-*.json"))
    keys = set(re.findall(r'"minio://mlpipeline/([^"]+)"', text))
    assert len(keys) >= 10
    bucket = Bucket(
        [ListedObject(Address("mlpipeline", f"{key}/file"), 1, 0.0) for key in keys], Connection()
    )
    assert bucket.foreign == []
    assert {each.run for each in bucket.executions.values()} == {key.split("/")[3] for key in keys}
    steps = {each.step for each in bucket.executions.values()}
    assert steps == {
        "compare",
        "prepare-data",
        "quantize-load",
        "re-evaluate",
        "select-layers",
        "snr-analyze",
        "train",
    }
    found = {name for each in bucket.executions.values() for name in each.artifacts}
    assert not any(name.startswith("executor-logs") for name in found) and "adapter" in found
    assert json.loads((RECORDED / "executor-train.json").read_text())["outputs"]["artifacts"].keys() & found
