"""A step's command line is its component: names, types and meanings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kfp import dsl
from spectraqlora.runtime import command_line
from spectraqlora.runtime.images import images

from tests.s3 import free_port

ROOT = Path(__file__).resolve().parents[2]


def call(
    *arguments: str, image: str = "", folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in the named image."""
    environment = {
        command_line.IMAGE: image,
        "PYTHONPATH": str(ROOT / "components"),
        "PATH": "/usr/bin:/bin",
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-m", "spectraqlora", *arguments],
        capture_output=True, text=True, env=environment, check=False, cwd=folder,
    )  # fmt: skip


@pytest.mark.parametrize("step", command_line.steps())
def test_every_parameter_of_a_component_is_an_option_with_its_meaning(step: str) -> None:
    function = command_line.component(step)
    described = command_line.options(function)
    returned = {command_line.RETURNED} if step == "detect-changes" else set()
    assert {option.name for option in described} == returned | set(
        function.__code__.co_varnames[: function.__code__.co_argcount]
    )
    assert all(option.help for option in described)
    assert any(option.kind == "output" for option in described)
    shown = command_line.parser(step, function).format_help()
    for option in described:
        assert option.flag in shown


def test_an_image_explains_its_steps_and_runs_only_those() -> None:
    shown = call("--help", image="light")
    assert shown.returncode == 0
    assert "prepare-data" in shown.stdout and "compare" in shown.stdout and "snr-analyze" not in shown.stdout
    refused = call("train", image="light")
    assert refused.returncode == 2
    assert (
        refused.stderr
        == f"error: STEP: 'train': expected one of {', '.join(images()['light'])}, or a program\n"
    )


def test_an_image_of_one_step_needs_no_name() -> None:
    shown = call("--help", image="train")
    assert "--four-bit DIR" in shown.stdout and "Example: train --four-bit four_bit" in shown.stdout


def test_another_program_is_passed_on_with_its_exit_code() -> None:
    done = call("sh", "-ec", 'echo "$0 $1"; exit 3', "a", "b", image="train")
    assert (done.stdout, done.returncode) == ("a b\n", 3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: arguments: 'quantize-load': expected the following arguments are required: --base-model"),
        (["--base-model", "x", "--four-bit", "out", "--outline", "out", "--model-settings", "[1]"], "error: --model-settings: '[1]': expected a JSON object"),
        (["--base-model", "x", "--four-bit", "/proc/none", "--outline", "out"], "error: --four-bit: '/proc/none': expected a folder that can be written"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_line_and_exit_code_2(arguments: list[str], line: str, tmp_path: Path) -> None:
    refused = call("quantize-load", *[str(tmp_path) if a == "out" else a for a in arguments])
    assert refused.returncode == 2
    assert refused.stderr.startswith(line) and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("step", "options", "variables", "field"),
    [
        (
            "quantize-load", ("--base-model", "s3://bucket/model", "--four-bit", "four_bit", "--outline", "outline"),
            {"AWS_ENDPOINT_URL": "{}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"},
            "s3 address: 's3://bucket/model'",
        ),
        (
            "quantize-load", ("--base-model", "owner/model", "--four-bit", "four_bit", "--outline", "outline"),
            {"HF_ENDPOINT": "{}"}, "model.base_model: 'owner/model'",
        ),
        (
            "start-point", ("--tracking-settings", '{{"uri": "{}"}}', "--rank-map", ".", "--start-rank-map", "map", "--start-adapter", "adapter"),
            {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}, "tracking.uri",
        ),
    ],
)  # fmt: skip
def test_a_service_that_is_away_ends_a_step_in_a_manner_that_is_tried_again(
    step: str, options: tuple[str, ...], variables: dict[str, str], field: str, tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    given = {name: value.format(address) for name, value in variables.items()}
    home = {"HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path)}
    done = call(step, *[option.format(address) for option in options], **given, **home, folder=tmp_path)
    assert done.returncode == 75, done.stdout + done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: no answer: {field}")


def test_a_missing_input_folder_is_named(tmp_path: Path) -> None:
    refused = call("snr-analyze", "--outline", "none", "--table", str(tmp_path / "table"))
    assert refused.returncode == 2
    assert refused.stderr == "error: --outline: 'none': expected the folder of an artifact\n"
    assert not (tmp_path / "table").exists()


def test_a_step_runs_and_says_what_it_wrote(
    outline: Path, tiny_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line.run(
        "prepare-data",
        [
            *("--source", str(tiny_rows), "--data-settings", '{"eval_fraction": 0.25}'),
            *("--outline", str(outline), "--rows", str(tmp_path / "rows")),
        ],
    )
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["rows"]["eval_rows"] == 12
    assert (tmp_path / "rows" / "manifest.json").exists()


def test_what_a_step_wrote_may_be_taken_along_by_another_user(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = ["--four-bit", str(tmp_path / "four_bit"), "--outline", str(tmp_path / "outline")]
    command_line.run("quantize-load", ["--base-model", str(tiny_model), *outputs])
    assert "digest" in capsys.readouterr().out
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in written)
    expected = 0o666 & ~_umask()
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {oct(expected)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def count_letters(text: str, longest: dsl.OutputPath(str)) -> str:  # type: ignore[valid-type]
    """Count.

    Args:
        text: to count.
        longest: its longest word.
    """
    Path(longest).write_text(max(text.split(), key=len))
    return str(len(text))


def test_a_returned_text_is_a_file_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "component", lambda step: count_letters)
    command_line.run(
        "count", ["--text", "an example", "--longest", str(tmp_path / "l"), "--output", str(tmp_path / "o")]
    )
    assert json.loads(capsys.readouterr().out) == {"longest": "example", "Output": "10"}
    assert ((tmp_path / "l").read_text(), (tmp_path / "o").read_text()) == ("example", "10")
    command_line.run("count", ["--text", "by hand"])
    assert json.loads(capsys.readouterr().out)["longest"] == "hand"
