"""Lines of steps: the same in a pod under KFP's executor, on a laptop, and when standard output is redirected."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from spectraqlora.runtime.console import Progress, fail, quiet, say, warn

ROOT = Path(__file__).resolve().parents[3]


def test_every_kind_of_line_has_its_own_beginning_and_goes_to_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say("scoring 100% of 5 rows")
    warn("no checkpoint of step 40")
    fail("data.source: 'x': expected rows")
    Progress("tokenizing rows", 3)(3, "row 3")
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "scoring 100% of 5 rows",
        "WARNING: no checkpoint of step 40",
        "error: data.source: 'x': expected rows",
        "progress: 3/3 tokenizing rows row 3",
    ]
    assert printed.err == ""


def test_progress_is_printed_about_twice_a_second_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("tokenizing rows", 1000)
    for done in range(1, 1001):
        progress(done)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "progress: 1/1000 tokenizing rows" and last == "progress: 1000/1000 tokenizing rows"


def test_redirected_output_takes_the_lines_along_and_quiet_keeps_errors_only() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as heard:
        say("here")
        with quiet():
            say("not this")
            warn("nor this")
            fail("but this")
        say("again")
    assert heard.getvalue().splitlines() == ["here", "error: but this", "again"]


def test_kfps_executor_adds_nothing_to_a_line() -> None:
    probe = (
        "import logging, sys; logging.basicConfig(stream=sys.stdout, level=logging.INFO,"
        " format='[KFP Executor %(levelname)s]: %(message)s');"
        "from spectraqlora.runtime.console import Progress, say; say('one'); Progress('rows', 2)(2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "components")},
    )  # fmt: skip
    assert done.stdout == "one\nprogress: 2/2 rows\n"
