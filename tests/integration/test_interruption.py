"""A run that is stopped leaves no process behind and goes on where it was."""

import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.integration.test_dag import CLI, spectraqlora


def _start_and_stop(arguments: list[str], number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Send the signal while select-layers or train runs; the result, once no child is left."""
    process = subprocess.Popen([*CLI, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "select-layers" in line:
            break
    else:
        raise AssertionError("".join(seen))
    time.sleep(3)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_a_run_that_is_stopped_twice_leaves_no_process_and_goes_on_where_it_was(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    arguments = [
        "run", "--base-model", str(tiny_model), "--data", str(tiny_rows), "--workdir", str(tmp_path / "w"),
        "--methods", "hybrid", "--max-steps", "4", "--set", "evaluate.accuracy_rows=0",
    ]  # fmt: skip

    def quantized() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("four_bit/manifest.json")}

    stopped = _start_and_stop(arguments, signal.SIGTERM)
    assert stopped.returncode == 130
    assert stopped.stderr == "interrupted; run, and snr with --output, resume where they stopped\n"
    first = quantized()
    assert first
    _start_and_stop(arguments, signal.SIGKILL)
    done = spectraqlora(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert quantized() == first
