"""What a run in a workdir is made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.files import file_digest
from spectraqlora.places import base_digest, base_place, data_place
from spectraqlora.settings import parse
from spectraqlora_pipelines.local import preflight

from tests.hub import Hub

CLAIM = """
import json, sys
from pathlib import Path
from spectraqlora.places import base_place, data_place
from spectraqlora.settings import parse
from spectraqlora_pipelines.local import preflight
workdir, settings = Path(sys.argv[1]), parse({})
contents = preflight.contents(settings, base_place("owner/name"), data_place("owner/rows"), workdir)
preflight.claim_workdir(workdir, settings, contents)
print(json.dumps(contents))
"""


def test_local_inputs_that_changed_are_another_run(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    rows, workdir = tmp_path / "rows.jsonl", tmp_path / "work"
    rows.write_bytes(tiny_rows.read_bytes())
    settings = parse({"snr": {"table": str(rows)}})
    base, source = base_place(str(tiny_model)), data_place(str(rows))
    contents = preflight.contents(settings, base, source, workdir)
    assert contents == {
        "base_model": base_digest(tiny_model),
        "data": file_digest(rows),
        "snr_table": file_digest(rows),
    }
    preflight.claim_workdir(workdir, settings, contents)
    preflight.claim_workdir(workdir, settings, preflight.contents(settings, base, source, workdir))
    rows.write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(InputError, match=r"--workdir.*contents\.data was"):
        preflight.claim_workdir(workdir, settings, preflight.contents(settings, base, source, workdir))


def test_a_workdir_of_0_1_0_is_refused_as_one_and_left_alone(tmp_path: Path) -> None:
    settings = parse({})
    # What 0.1.0 wrote: no version of its artifacts, and other settings.
    document = {
        "version": "0.1.0",
        "settings": {"evaluate": {"energy": 0.95}},
        "contents": {},
        "pipeline": "ablation",
    }
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(InputError) as refused:
        preflight.claim_workdir(tmp_path, settings, {})
    assert str(refused.value).endswith(
        "expected a new folder; this one holds a run of another version, such as 0.1.0, to be made anew"
    )
    assert json.loads((tmp_path / "run.json").read_text()) == document


def test_a_hub_id_keeps_the_commit_of_the_first_run_in_a_workdir(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    def claim(workdir: str, **variables: str) -> dict[str, str]:
        path = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", CLAIM, str(tmp_path / workdir)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path, **environment, **variables},
        )
        return json.loads(done.stdout.splitlines()[-1])

    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        first = {
            "base_model": hub.publish("models", "owner/name", tiny_model),
            "data": hub.publish("datasets", "owner/rows", tiny_rows.parent),
        }
        assert claim("one") == first
        later = {
            "base_model": hub.publish("models", "owner/name", tiny_rows.parent),
            "data": hub.publish("datasets", "owner/rows", tiny_model),
        }
        assert claim("one") == first, "the same command resumes the same run"
        assert claim("two") == later
    assert claim("one", HF_HUB_OFFLINE="1") == first
