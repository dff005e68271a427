"""Planned and measured memory of the steps that hold a model, each in its process as `run` starts it.

    python -m tests.benchmarks.memory [--base-model DIR] [--shapes 4x128 8x192] [--set SECTION.KEY=VALUE …]

Every shape is one `spectraqlora run` of qlora on rows of full length, with the environment as it is: no thread count is
chosen, and no allocator. With GLIBC_TUNABLES=glibc.malloc.perturb=0, a choice that changes nothing, steps leave glibc's as
it is. Measured is the peak resident memory of a step's processes (`VmHWM` in /proc/PID/status), mapped
libraries and weights among it, as Linux, `ps` and `/usr/bin/time` count it; planned is the same, in main memory, without a
GPU. Seconds are those of processors. Without --base-model it is a random model of the shapes of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil

STEPS = ("quantize-load", "measure-base", "train", "re-evaluate", "merge-export")
MIB = 2**20
_FUNCTION = "--function_to_execute"
_INTERVAL_S = 0.01


@dataclass(frozen=True)
class Shape:
    """Rows per forward pass, and tokens per row."""

    rows: int
    tokens: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """From `4x128`."""
        rows, tokens = text.split("x")
        return cls(int(rows), int(tokens))

    @property
    def assignments(self) -> list[str]:
        """Settings for a short run of such batches."""
        return [
            f"train.batch_size={self.rows}", f"evaluate.batch_size={self.rows}", f"data.max_length={self.tokens}",
            "train.max_steps=3", "train.evaluations=1", "methods=qlora",
        ]  # fmt: skip


def make_model(folder: Path) -> None:
    """A model of random weights in the shapes of SmolLM2-135M, in bfloat16, with a tokenizer of few words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.chat_templates import plain_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    plain_tokenizer().save_pretrained(folder)


def write_rows(path: Path, shape: Shape, words: list[str]) -> None:
    """Texts that fill rows, as many as the run needs."""
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words, k=2 * shape.tokens)) for _ in range(4 * shape.rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def peak_resident(process: psutil.Process) -> int:
    """Most that was resident of a process so far, bytes; 0 where it is gone."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


@dataclass
class Use:
    """What a step's processes took.

    Args:
        peak: most that was resident, bytes.
        seconds: of processors.
    """

    peak: int = 0
    seconds: float = 0.0


def measure(command: list[str]) -> dict[str, Use]:
    """What every step's processes take while a command runs, by the step's name."""
    uses: dict[psutil.Process, Use] = defaultdict(Use)
    steps: dict[psutil.Process, str] = {}
    with tempfile.TemporaryFile() as said:
        command_line = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while command_line.poll() is None:
            for process in psutil.Process(command_line.pid).children(recursive=True):
                if not steps.get(process):
                    steps[process] = _step(process)
                # Until it starts its own program a new process counts what its parent has.
                if steps[process]:
                    use = uses[process]
                    use.peak = max(use.peak, peak_resident(process))
                    with contextlib.suppress(psutil.Error):
                        use.seconds = sum(process.cpu_times()[:2])
            time.sleep(_INTERVAL_S)
        if command_line.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')}")
    found: dict[str, Use] = defaultdict(Use)
    for process, use in uses.items():
        found[steps[process]].peak += use.peak
        found[steps[process]].seconds += use.seconds
    return found


def _step(process: psutil.Process) -> str:
    """The step that a process or its parent executes; empty where none."""
    with contextlib.suppress(psutil.Error):
        for each in (process, *process.parents()):
            words = each.cmdline()
            if _FUNCTION in words:
                return words[words.index(_FUNCTION) + 1].replace("_", "-")
    return ""


def compare(base_model: Path, shape: Shape, folder: Path, more: list[str]) -> dict[str, tuple[int, Use]]:
    """Planned bytes and what was taken, of every step of a run.

    Args:
        base_model: folder of the model.
        shape: of the batches.
        folder: for the data and the work directory.
        more: further settings, `section.key=value`.
    """
    from spectraqlora.planning.steps import plan_for
    from spectraqlora_pipelines.cli.options import load_settings
    from transformers import AutoTokenizer

    words = [w for w in AutoTokenizer.from_pretrained(base_model).get_vocab() if w.isalpha() and len(w) > 1]
    folder.mkdir()
    write_rows(folder / "rows.jsonl", shape, sorted(words)[:2000])
    given = [
        *shape.assignments,
        f"model.base_model={base_model}",
        f"data.source={folder / 'rows.jsonl'}",
        *more,
    ]
    sets = [part for assignment in given for part in ("--set", assignment)]
    measured = measure(
        [sys.executable, "-m", "spectraqlora_pipelines.cli", "run", "--workdir", str(folder / "work"), *sets],
    )
    plan, _ = plan_for(str(base_model), load_settings(None, {}, given), 0)
    planned = {memory.step: memory.device for memory in plan.steps}
    return {step: (planned[step], measured[step]) for step in STEPS}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["4x128", "8x192"])
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base_model = options.base_model
        if base_model is None:
            base_model = Path(scratch, "model")
            make_model(base_model)
        print("| step | rows x tokens | planned, MiB | measured, MiB | planned / measured | seconds |")
        print("| --- | --- | --- | --- | --- | --- |")
        for text in options.shapes:
            found = compare(base_model.resolve(), Shape.of(text), Path(scratch, text), options.more)
            for step, (planned, measured) in found.items():
                figures = f"{planned / MIB:.0f} | {measured.peak / MIB:.0f} | {planned / measured.peak:.2f}"
                figures += f" | {measured.seconds:.0f}"
                print(f"| {step} | {text.replace('x', ' x ')} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
