"""What the command line says of itself on a terminal of 80 columns and 24 lines, and how its commands end."""

from __future__ import annotations

import errno
import re
import subprocess
import sys

import pytest
import typer
from spectraqlora.errors import InputError
from spectraqlora.settings import reference
from spectraqlora_pipelines.cli import app
from spectraqlora_pipelines.cli.settings import MOST_CHANGED
from spectraqlora_pipelines.local.run import StepFailed
from typer.testing import CliRunner

COLUMNS, LINES = 80, 24
PANELS = {
    "Run and look": ["run", "report", "data", "snr", "plan", "sample", "settings"],
    "Cluster and models": [
        *("compile", "submit", "status", "logs", "models", "gc", "verify", "schedule", "promote"),
    ],
}


def commands() -> list[list[str]]:
    """Every command, and every command inside a group."""
    group = typer.main.get_command(app.app)
    inner = [[name, sub] for name, each in group.commands.items() for sub in getattr(each, "commands", {})]
    return [[name] for name in group.commands] + inner


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


def help_of(*command: str) -> list[str]:
    done = CliRunner().invoke(app.app, [*command, "--help"])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_the_first_help_fits_one_screen_with_a_line_for_every_command_in_its_panel() -> None:
    shown = help_of()
    used = [number for number, text in enumerate(shown) if text.strip()]
    assert used[-1] - used[0] + 1 < LINES, "a line is left for the prompt"
    found: dict[str, list[str]] = {}
    for text in shown:
        if text.startswith("╭─ "):
            found[text.strip("╭─╮ ")] = listed = []
        elif text.startswith("│"):
            listed.append(text.split()[1])
    assert found == PANELS


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself_without_cutting_a_word_short(command: list[str]) -> None:
    shown = help_of(*command)
    assert all(len(text) <= COLUMNS and "…" not in text for text in shown)
    text = "\n".join(shown)
    is_group = command in (["schedule"],)
    assert is_group or "Example" in text, "help teaches with an example"
    first = typer.main.get_command(app.app)
    for name in command:
        first = first.commands[name]
    for option in first.params:
        assert all(flag in text for flag in option.opts if flag.startswith("--")), option.opts


def test_run_shows_the_settings_people_change_most_and_where_all_are() -> None:
    text = "\n".join(help_of("run"))
    described = {key: default for key, default, _ in reference()}
    assert len(MOST_CHANGED) == 5
    for key in MOST_CHANGED:
        assert f"{key} " in text and f" {described[key]} " in text
    assert "spectraqlora settings" in text and "train.max_grad_norm" not in text
    assert len(help_of("run")) < 40


@pytest.mark.parametrize("command", [["submit"], ["schedule", "create"]], ids=" ".join)
def test_commands_of_jobs_name_the_environment_variables_of_their_options(command: list[str]) -> None:
    text = " ".join("\n".join(help_of(*command)).split())
    assert "SPECTRAQLORA_KFP_TOKEN" in text and "each after SPECTRAQLORA_: " in text
    named = text.rpartition("SPECTRAQLORA_: ")[2].rstrip(".").split(", ")
    assert {"CONFIG", "KFP_HOST", "PIPELINE_PACKAGE", "CLUSTER_VALUES"} < set(named)


def test_help_loads_no_library_that_takes_its_time() -> None:
    heavy = {
        "torch",
        "kfp",
        "transformers",
        "datasets",
        "mlflow",
        "pandas",
        "numpy",
        "boto3",
        "docker",
        "kubernetes",
    }
    probe = (
        "import sys, atexit; sys.argv = ['spectraqlora', 'run', '--help'];"
        f"atexit.register(lambda: print('loaded:', sorted({heavy!r} & sys.modules.keys())));"
        "from spectraqlora_pipelines.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_the_module_is_the_command_line_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spectraqlora_pipelines.cli", "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip().count(".") == 2


def end_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command line with one command, which raises the error."""

    def fails() -> None:
        raise error

    failing = typer.Typer(pretty_exceptions_enable=False)
    failing.command()(fails)
    monkeypatch.setattr(app, "app", failing)
    monkeypatch.setattr(sys, "argv", ["spectraqlora"])
    app.main()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("--set", "x", "section.key=value"), 2, "error: --set: 'x': expected section.key=value"),
        (StepFailed("Inner task failed: 'train'. Read run.log"), 1, "error: Inner task failed: 'train'. Read run.log"),
        (KeyboardInterrupt(), 130, "interrupted; run, and snr with --output, resume where they stopped"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_their_exit_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        end_with(error, monkeypatch)
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == line and printed.out == ""


def test_a_full_disk_is_one_line_with_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("not saved")
    error.__cause__ = OSError(errno.ENOSPC, "full", "out")
    with pytest.raises(SystemExit) as ended:
        end_with(error, monkeypatch)
    assert ended.value.code == 2
    assert re.fullmatch(
        r"error: disk: 'out': expected free space: [\d.]+ \w+ are left\n", capsys.readouterr().err
    )


def test_another_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IndexError):
        end_with(IndexError("empty"), monkeypatch)


@pytest.mark.parametrize("command", [["nonsense"], ["run", "--nonsense"], ["snr"]], ids=" ".join)
def test_a_command_line_that_does_not_parse_ends_with_2_and_points_at_help(command: list[str]) -> None:
    done = CliRunner().invoke(app.app, command)
    assert done.exit_code == 2 and "--help' for help" in done.output
