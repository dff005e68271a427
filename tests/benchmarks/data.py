"""Rows/s and memory of preparing rows, next to what one writes by hand with `datasets`.

    python -m tests.benchmarks.data [--rows 1000000] [--by-hand-rows 100000] [--base-model DIR]

Short chats are generated. By hand is the plain way: `load_dataset("json")`, then `map` with `apply_chat_template`, a row
at a time in one process, and again with a process per core. Ours is what prepare-data does: read, account for, split,
render with labels, save. Both sides render with the same tokenizer and template, each in a process of its own; memory is
the peak of what the process and its children hold, without pages of files that are only mapped (anonymous memory).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORES = len(os.sched_getaffinity(0))
MIB = 2**20
_TEXT = (
    "how many apples are left in the basket when two of them go to the market and one is eaten on the way "
    "please tell me which colour the house at the river has and who lives there with the old dog"
)
_WORDS = _TEXT.split()


def main() -> None:
    """Print rows/s and peak memory of every side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--by-hand-rows", type=int, default=100_000)
    parser.add_argument("--base-model", type=Path, help="whose tokenizer renders; the sample's by default")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        seconds = SIDES[options.side](options.base_model, options.file)
        print(json.dumps({"seconds": seconds}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = make_base(options.base_model, folder / "base")
        print(f"{CORES} cores; prompts and answers of 5 to 30 words in 1 to 3 exchanges")
        for side, rows in (
            ("by hand", options.by_hand_rows),
            ("by hand, a process per core", options.by_hand_rows),
            ("prepare-data", options.by_hand_rows),
            ("prepare-data", options.rows),
        ):
            file = make_rows(folder / f"{rows}.jsonl", rows)
            seconds, cpu_seconds, memory = measure(side, base, file)
            print(
                f"{side:<28} {rows:>9,} rows  {rows / seconds:>7,.0f} rows/s  "
                f"{rows / cpu_seconds:>7,.0f} rows a processor second  {memory / MIB:>6,.0f} MiB",
                flush=True,
            )


def make_base(given: Path | None, folder: Path) -> Path:
    """A folder with config and tokenizer, and a ChatML template."""
    import shutil

    from spectraqlora.places import base_place
    from spectraqlora.sample.make import on_this_machine

    source = given or on_this_machine(base_place("sample")).path
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def make_rows(path: Path, count: int) -> Path:
    """Short chats, no two alike, as JSON lines."""
    if not path.exists():
        with open(path, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"messages": chat}) + "\n" for chat in chats(count))
    return path


def chats(count: int) -> Iterator[list[dict[str, str]]]:
    """Conversations of one to three exchanges."""
    draw = random.Random(0)

    def said(start: str = "") -> str:
        return start + " ".join(draw.choices(_WORDS, k=draw.randint(5, 30)))

    for number in range(count):
        turns: list[dict[str, str]] = []
        for _ in range(draw.randint(1, 3)):
            turns += [
                {"role": "user", "content": said("" if turns else f"{number}: ")},
                {"role": "assistant", "content": said()},
            ]
        yield turns


def measure(side: str, base: Path, file: Path) -> tuple[float, float, float]:
    """(seconds, processor seconds, bytes at the peak) of one side in a process of its own.

    Processor seconds are those of all its processes, their start included: other work on the machine moves them less.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.data",
        "--side",
        side,
        "--base-model",
        str(base),
        "--file",
        str(file),
    ]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_DATASETS_CACHE": cache}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
        )
        peak = Peak(process.pid)
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{side} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(output.splitlines()[-1])["seconds"], cpu, peak.bytes


class Peak:
    """The most anonymous memory that a process and its children held together, asked for ten times a second."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._root = psutil.Process(pid)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._root.is_running():
            try:
                family = [self._root, *self._root.children(recursive=True)]
                self.bytes = max(self.bytes, sum(_anonymous(process.pid) for process in family))
            except psutil.NoSuchProcess:
                return
            time.sleep(0.1)


def _anonymous(pid: int) -> int:
    """Bytes of a process that are in no file, each shared page counted in parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def by_hand(base: Path, file: Path, processes: int | None = None) -> float:
    """`datasets.map` with `apply_chat_template`; returns seconds."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    start = time.monotonic()
    rows = load_dataset("json", data_files=str(file), split="train")
    rows = rows.map(
        lambda row: dict(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)),
        remove_columns=rows.column_names,
        num_proc=processes,
    )
    assert len(rows[0]["input_ids"]) > 10
    return time.monotonic() - start


def ours(base: Path, file: Path) -> float:
    """What prepare-data does; returns seconds."""
    from spectraqlora.data.for_model import row_model
    from spectraqlora.runtime.console import quiet
    from spectraqlora.settings import DataSettings
    from spectraqlora.steps.prepare_data.prepare import prepare_for

    settings = DataSettings(source=str(file))
    model = row_model(base, settings)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, quiet():
        start = time.monotonic()
        rows = prepare_for(model, settings, 1, Path(folder))
        seconds = time.monotonic() - start
    used = rows.train_rows + rows.eval_rows + rows.test_rows
    assert rows.account.read == used + sum(entry.rows for entry in rows.account.dropped)
    return seconds


SIDES: dict[str, Any] = {
    "by hand": by_hand,
    "by hand, a process per core": lambda base, file: by_hand(base, file, CORES),
    "prepare-data": ours,
}

if __name__ == "__main__":
    main()
