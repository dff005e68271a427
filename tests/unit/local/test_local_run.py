"""What a local run keeps of the steps' output."""

import threading
from pathlib import Path

from spectraqlora_pipelines.local.run import _Lines

TRACEBACK = """Traceback (most recent call last):
  File "/x/step.py", line 3, in run
    raise Broken("no such thing")
spectraqlora.made_up.Broken: no such thing
"""


def test_a_refusal_is_remembered_however_much_is_written_after_it(tmp_path: Path) -> None:
    heard: list[str] = []
    with _Lines(tmp_path / "run.log", heard.append) as lines:
        lines.begin("train")
        lines.write("    error: data.max_length: '8': expected a length that leaves rows\n")
        lines.write("the step has more to say\n" * 500)
        assert lines.outputs["train"].refusal == "data.max_length: '8': expected a length that leaves rows"
    assert len(heard) == 501


def test_the_last_line_of_a_traceback_is_the_reason_however_much_is_written_after_it(tmp_path: Path) -> None:
    with _Lines(tmp_path / "run.log", lambda line: None) as lines:
        lines.begin("train")
        lines.write(TRACEBACK + "cleaning up\n" * 500 + "-" * 40 + "\n")
        lines.begin("merge-export")
        lines.write("".join(f"    [rank1]: {line}\n" for line in TRACEBACK.splitlines()))
        lines.begin("register")
        lines.write(
            "one line\n    Killed\n\n19:46:44.097 - ERROR - Task 'register' finished with status FAILURE\n"
        )
        reasons = {step: output.reason for step, output in lines.outputs.items() if step}
    broken = "spectraqlora.made_up.Broken: no such thing"
    assert reasons == {"train": broken, "merge-export": broken, "register": "Killed"}


def test_steps_that_write_at_the_same_time_keep_their_own_lines(tmp_path: Path) -> None:
    turns = threading.Barrier(2)

    def work(step: str) -> None:
        lines.begin(step)
        for number in range(50):
            turns.wait()
            lines.write(f"{step} says {number}, ")
            lines.write("and a bit more\n")
        lines.write(f"error: {step}: 'x': expected another\n")

    with _Lines(tmp_path / "run.log", lambda line: None) as lines:
        threads = [threading.Thread(target=work, args=(step,)) for step in ("prepare-data", "snr-analyze")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for step in ("prepare-data", "snr-analyze"):
            assert lines.outputs[step].refusal == f"{step}: 'x': expected another"
    step = ""
    for line in (tmp_path / "run.log").read_text().splitlines():
        if line.startswith("====="):
            step = line.strip("= ")
        elif line and not line.startswith("error: "):
            assert line.startswith(f"{step} says ") and line.endswith("and a bit more")
