"""What a run in a workdir is made of."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.files import file_digest
from spectraqlora.places import base_digest, base_place, data_place
from spectraqlora.runtime.disk import free_bytes
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
contents = preflight.contents(settings, base_place("owner/name"), [data_place("owner/rows")], workdir)
preflight.claim_workdir(workdir, settings, contents)
print(json.dumps(contents))
"""


def test_the_content_of_local_inputs_is_part_of_a_run_and_may_change(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    rows, workdir = tmp_path / "rows.jsonl", tmp_path / "work"
    rows.write_bytes(tiny_rows.read_bytes())
    settings = parse({"snr": {"table": str(rows)}})
    base, source = base_place(str(tiny_model)), data_place(str(rows))
    contents = preflight.contents(settings, base, [source], workdir)
    assert contents == {
        "base_model": base_digest(tiny_model),
        "data": file_digest(rows),
        "snr_table": file_digest(rows),
    }
    preflight.claim_workdir(workdir, settings, contents)
    preflight.claim_workdir(workdir, settings, preflight.contents(settings, base, [source], workdir))
    rows.write_text('{"question": "q", "answer": "a"}\n')
    changed = preflight.contents(settings, base, [source], workdir)
    assert changed["data"] == file_digest(rows) != contents["data"]
    preflight.claim_workdir(workdir, settings, changed)
    assert json.loads((workdir / "run.json").read_text())["contents"] == changed


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
        "expected a new folder, or --fresh; this one holds a run of another version, such as 0.1.0, to be made anew"
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
        stored = tmp_path / "one" / "run.json"
        kept = stored.read_text()
        stored.write_text(kept.replace('"revision": "main"', '"revision": "v1"'))
        assert claim("one") == {**later, "data": first["data"]}, "a pin is of what the settings name"
        stored.write_text(kept)
    assert claim("one", HF_HUB_OFFLINE="1") == first


HOLD = """
import sys, time
from pathlib import Path
from spectraqlora.settings import parse
from spectraqlora_pipelines.local import preflight
lock = preflight.claim_workdir(Path(sys.argv[1]), parse({}), {})
print("works", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_workdir_is_refused_with_the_first_ones_process_until_that_ends(
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "work"
    path = os.pathsep.join(sys.path)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "works\n"
        for settings in (parse({}), parse({"seed": 7})):
            with pytest.raises(InputError) as refused:
                preflight.claim_workdir(workdir, settings, {})
            wanted = f"no other run works; a run (pid {first.pid} on {socket.gethostname()}) does"
            assert str(refused.value).endswith(wanted)
    finally:
        first.kill()
        first.communicate()
    lock = preflight.claim_workdir(workdir, parse({}), {})
    with pytest.raises(InputError, match=rf"pid {os.getpid()} on"):
        preflight.claim_workdir(workdir, parse({}), {})
    lock.close()
    preflight.claim_workdir(workdir, parse({}), {}).close()


def test_a_file_that_appears_beside_the_model_does_not_make_another_run(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    base = base_place(str(shutil.copytree(tiny_model, tmp_path / "model")))
    source, workdir = data_place(str(tiny_rows)), tmp_path / "work"
    first = preflight.contents(parse({}), base, [source], workdir)
    for name in (
        ".DS_Store",
        "notes.txt",
        "eval_results.json",
        "model.onnx",
        "pytorch_model.bin",
        "extra.safetensors",
    ):
        (base.path / name).write_text("by the way")
    (base.path / ".cache" / "huggingface").mkdir(parents=True)
    (base.path / ".cache" / "huggingface" / "config.json").write_text("{}")
    (base.path / "onnx").mkdir()
    (base.path / "onnx" / "config.json").write_text("{}")
    assert preflight.contents(parse({}), base, [source], workdir) == first
    (base.path / "chat_template.jinja").write_text("{{ messages }}")
    assert preflight.contents(parse({}), base, [source], workdir) != first


def test_a_foreign_folder_is_no_workdir_and_nothing_is_written_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="an empty or new folder"):
        preflight.claim_workdir(tmp_path, parse({}), {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_starting_over_leaves_nothing_to_take_up_and_keeps_what_was_made(tmp_path: Path) -> None:
    workdir = tmp_path / "work"
    preflight.claim_workdir(workdir, parse({}), {}).close()
    (workdir / "run.json").write_text('{"version": "0.0.1"}')
    made = ("artifacts/run-1/merge-export/exported/merged/x", "outputs.json", "mlflow.db")
    for name in ("artifacts/.steps/1.json", "artifacts/checkpoints/2/x", *made):
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text("{}")
    with pytest.raises(InputError, match="--fresh"):
        preflight.claim_workdir(workdir, parse({}), {})
    preflight.claim_workdir(workdir, parse({"seed": 7}), {}, fresh=True).close()
    assert {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()} == {
        ".lock", "run.json", *made,
    }  # fmt: skip
    assert json.loads((workdir / "run.json").read_text())["settings"]["seed"] == 7


def test_starting_over_in_a_foreign_folder_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    with pytest.raises(InputError, match="an empty or new folder"):
        preflight.claim_workdir(tmp_path, parse({}), {}, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]


def test_a_run_that_writes_more_than_the_disk_has_left_is_refused_before_its_first_step(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, source = base_place(str(tiny_model)), data_place(str(tiny_rows))
    preflight.check_disk(parse({}), base, [source], tmp_path / "work")
    free = free_bytes(tmp_path)
    huge = shutil.copytree(tiny_model, tmp_path / "huge")
    config = json.loads((huge / "config.json").read_text())
    numbers = free // 2 // config["hidden_size"]
    (huge / "config.json").write_text(json.dumps({**config, "vocab_size": numbers, "dtype": "float32"}))
    with pytest.raises(InputError) as refused:
        preflight.check_disk(parse({}), base_place(str(huge)), [source], tmp_path / "work")
    assert re.fullmatch(
        rf"disk: '{tmp_path}/work': expected [\d.]+ [GT]iB free for the run, [\d.]+ [GT]iB of it for merge-export; "
        r"the command plan shows all; there are [\d.]+ [GT]iB",
        str(refused.value),
    )
    steps = tmp_path / "work" / "artifacts" / ".steps"
    steps.mkdir(parents=True)
    for step in ("quantize-load", "merge-export", "register"):
        (steps / f"{step}.json").write_text(json.dumps({"step": step, "arguments": {}, "outputs": {}}))
    preflight.check_disk(parse({}), base_place(str(huge)), [source], tmp_path / "work")
    with pytest.raises(InputError, match="disk: "):
        preflight.check_disk(parse({}), base_place(str(huge)), [source], tmp_path / "work", fresh=True)
