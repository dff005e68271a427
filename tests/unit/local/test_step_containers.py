"""What step containers see of this machine, and when a step counts as done."""

import json
import os
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.places import base_place, data_place
from spectraqlora.settings import parse
from spectraqlora.signing import SIGNING_KEY, VERIFYING_KEY
from spectraqlora_pipelines.local.containers import HostAccess, host_access, missing_outputs

from tests.keys import write_keys


def mounted(
    found: HostAccess, variables: dict[str, str] | None = None, step: str = "promote"
) -> dict[str, bool]:
    """Path to read-only of every mount; each lies where it lies here."""
    mounts = found.mounts(variables or {}, step)
    assert all(mount["Source"] == mount["Target"] for mount in mounts)
    return {mount["Source"]: mount["ReadOnly"] for mount in mounts}


def test_variables_of_storage_mlflow_and_hub_are_passed_and_no_others(tmp_path: Path) -> None:
    given = {
        "AWS_SECRET_ACCESS_KEY": "a", "MLFLOW_TRACKING_TOKEN": "b", "HF_TOKEN": "c", "HTTPS_PROXY": "d",
        "HOME": "/home/me", "PATH": "/bin", "SSH_AUTH_SOCK": "/run/ssh", "GITHUB_TOKEN": "no",
    }  # fmt: skip
    passed = HostAccess(tmp_path, user=4321).environment(given, "promote")
    places = {"TMPDIR", "XDG_CACHE_HOME", "HF_HOME"}
    assert passed.keys() - places == {
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_TOKEN",
        "HF_TOKEN",
        "HTTPS_PROXY",
        "SPECTRAQLORA_CPUS",
    }
    assert int(passed["SPECTRAQLORA_CPUS"]) >= 1
    assert all(Path(passed[name]).is_relative_to(tmp_path) for name in places)


@pytest.mark.parametrize(
    ("step", "seen"),
    [
        ("quantize-load", {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}),
        ("select-layers", set()),
        ("measure-base", set()),
        ("close-runs", {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"}),
        ("merge-export", {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", SIGNING_KEY}),
        (
            "promote",
            {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN", VERIFYING_KEY},
        ),
    ],
)
def test_a_step_sees_the_credentials_that_it_needs_and_the_signing_keys_file_is_merge_exports_alone(
    step: str, seen: set[str], tmp_path: Path
) -> None:
    key, _ = write_keys(tmp_path)
    given = {
        "AWS_SECRET_ACCESS_KEY": "a", "MLFLOW_TRACKING_TOKEN": "b", "HF_TOKEN": "c", SIGNING_KEY: str(key),
    }  # fmt: skip
    access = HostAccess(tmp_path / "work", user=4321)
    passed = access.environment(given, step)
    ours = {"TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "SPECTRAQLORA_CPUS"}
    assert passed.keys() - ours == seen
    assert (str(key) in mounted(access, given, step)) == (step == "merge-export")
    assert passed.get(VERIFYING_KEY, "-----BEGIN PUBLIC").startswith("-----BEGIN PUBLIC")


def test_inputs_are_mounted_read_only_and_the_workdir_to_be_written(tmp_path: Path) -> None:
    model, rows, work = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "work"
    model.mkdir()
    rows.write_text("{}")
    settings = parse(
        {
            "tracking": {"uri": f"sqlite:///{tmp_path}/elsewhere/mlflow.db"},
            "checkpoint": {"folder": str(tmp_path / "checkpoints")},
        }
    )
    found = mounted(host_access(settings, work, [base_place(str(model)), data_place(str(rows))], "host"))
    assert found[str(model)] and found[str(rows)]
    for folder in (work, tmp_path / "elsewhere", tmp_path / "checkpoints"):
        assert not found[str(folder)]
    places = [base_place("owner/name"), data_place("s3://bucket/rows")]
    remote = mounted(host_access(parse({}), work, places, "host"))
    assert not any(remote.values())


def test_files_behind_links_and_files_that_variables_name_come_along(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../blobs/abc")
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    found = mounted(
        HostAccess(tmp_path / "work", readable=[snapshot]),
        {"AWS_CA_BUNDLE": str(bundle), "AWS_CONFIG_FILE": "/none/config"},
    )
    assert found[str(blobs)] and found[str(bundle)]
    assert "/none/config" not in found


def test_what_lies_inside_another_mount_is_mounted_only_where_it_is_more_or_less_open(tmp_path: Path) -> None:
    inside, shard = tmp_path / "work" / "model", tmp_path / "work" / "model" / "shard"
    shard.mkdir(parents=True)
    found = mounted(HostAccess(tmp_path / "work", readable=[inside, shard], user=4321))
    assert found == {str(tmp_path / "work"): False, str(inside): True}


def test_an_input_that_the_steps_user_may_not_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"")
    (model / "model.safetensors").chmod(0o600)
    with pytest.raises(InputError, match=f"may read: chmod -R a\\+rX {model}"):
        HostAccess(tmp_path / "work", readable=[model], user=os.getuid() + 1).prepare()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("left", ["nothing", "no result", "empty folder", "all"])
def test_a_step_is_done_when_its_outputs_are_there(left: str, tmp_path: Path) -> None:
    result, folder = tmp_path / "executor_output.json", tmp_path / "adapter"
    executor_input = {
        "outputs": {
            "outputFile": str(result),
            "artifacts": {"adapter": {"artifacts": [{"uri": str(folder)}]}},
        }
    }
    command = [
        "sh",
        "-c",
        "x",
        "--executor_input",
        json.dumps(executor_input),
        "--function_to_execute",
        "train",
    ]
    if left != "nothing":
        folder.mkdir()
    if left in ("no result", "all"):
        (folder / "manifest.json").write_text("{}")
    if left in ("empty folder", "all"):
        result.write_text("{}")
    expected = {"nothing": [result, folder], "no result": [result], "empty folder": [folder], "all": []}
    assert missing_outputs(command) == expected[left]
