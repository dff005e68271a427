"""The GPU check: runs its parts one after the other and writes down what each has shown so far.

    python3 tests/gpu/check.py [--device cpu] [--small] [--seconds 470] [--carried build/gpu] [--results runs/gpu-check]

Needs no network and nothing but what `python -m tests.gpu.wheels` collected: wheels are unpacked into a folder of
their own, which goes before the machine's packages. Each part is a process with a time limit; the results

    results.json    the card, the versions, and every part's numbers; written anew whenever a part has new ones
    table.md        the same as tables for tests/benchmarks/README.md
    *.log           what each part printed

stand for what was reached, whenever the check is cut off. Ends with 1 where a part failed or was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.gpu.table import markdown  # noqa: E402 - needs the path above
from tests.gpu.wheels import MODEL, PYTHON, unpack  # noqa: E402

TOTAL = 470
"""Seconds for all parts; reading wheels and results takes the rest of eight minutes."""
GRACE = 8
"""Seconds that a part has after its own deadline before it is ended."""
IN_MEMORY = 40 * 2**30
"""Bytes that the checkpoints of the full shapes take, with room to spare."""


@dataclass(frozen=True)
class Part:
    """One process of the check."""

    name: str
    module: str
    seconds: int


PREPARE = Part("prepare", "tests.gpu.prepare", TOTAL)
PARTS = (
    Part("correctness", "tests.gpu.correctness", 130),
    Part("scan", "tests.gpu.scan", 60),
    Part("training", "tests.gpu.training", 230),
    Part("kernels", "tests.gpu.kernels", 50),
)

FACTS = """
import importlib.metadata, json, platform, torch
names = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "numpy")
versions = {}
for name in names:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
facts = {"python": platform.python_version(), "cuda": torch.version.cuda, "versions": versions}
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    facts |= {"card": card.name, "card_bytes": card.total_memory, "capability": [card.major, card.minor]}
print(json.dumps(facts))
"""


class Check:
    """One run of the check.

    Args:
        options: of the command line.
        scratch: folder for the parts' work.
        site: folder for unpacked wheels.
        results: folder for what was found.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path, site: Path, results: Path) -> None:
        self.options, self.scratch, self.site, self.results = options, scratch, site, results
        self.began = time.monotonic()
        # The dry run is for what happens, not for how soon: other work may share its processor.
        self.patience = 3 if options.small else 1
        self.environment = self._environment()
        self.found: dict[str, Any] = {"device": options.device, "small": options.small, "parts": {}}
        self.seen = ""
        self.prepared_after = 0.0

    def _environment(self) -> dict[str, str]:
        path = [str(ROOT / "components"), str(ROOT)]
        wheels = self.options.carried / "wheels"
        if wheels.is_dir() and sys.version_info[:2] == PYTHON:
            unpack(wheels, self.site)
            path.insert(0, str(self.site))
        elif wheels.is_dir() and self.options.device == "cuda":
            wanted = ".".join(map(str, PYTHON))
            raise SystemExit(f"{wheels} is for Python {wanted}; this is {platform.python_version()}")
        if already := os.environ.get("PYTHONPATH"):
            path.append(already)
        set_ = {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "SPECTRAQLORA_CHECK_DEVICE": self.options.device,
            # A machine without a network has no other interface; one process talks to itself alone.
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        # The model that travelled is for the card: on tiny shapes a tiny one will do.
        model = self.options.carried / "model"
        if model.is_dir() and not self.options.small and MODEL not in os.environ:
            set_[MODEL] = str(model.resolve())
        if self.options.device == "cpu":
            # Processes that share few cores lose more to threads than tiny shapes gain from them.
            set_ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        elif "CUDA_VISIBLE_DEVICES" not in os.environ:
            set_["CUDA_VISIBLE_DEVICES"] = "0"
        return {**os.environ, **set_}

    def facts(self) -> None:
        """What the check runs on.

        Raises:
            SystemExit: there is no GPU where one was asked for, or PyTorch does not load.
        """
        done = subprocess.run(
            [sys.executable, "-c", FACTS], env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        self.found |= json.loads(done.stdout.splitlines()[-1])
        if self.options.device == "cuda" and "card" not in self.found:
            raise SystemExit("PyTorch sees no GPU here; DEVICE=cpu SMALL=1 is the dry run")
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            self.found["driver"] = subprocess.run(
                query, capture_output=True, text=True, check=False
            ).stdout.strip()
        self.write()

    def start(self, part: Part, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """A part's process, which imports its libraries and waits for `begin`; what it prints goes to its log."""
        command = [sys.executable, "-m", part.module, "--work", str(self.scratch / "work")]
        command += ["--record", str(self._record(part)), *(["--small"] if self.options.small else [])]
        with open(self.results / f"{part.name}.log", "wb") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def begin(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Let a process begin its part, and tell it how long it has; it ends when this pipe does."""
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):  # It has ended already: its code and its log say why.
            process.stdin.write(f"{seconds}\n".encode())
            process.stdin.flush()

    def run(self) -> bool:
        """All parts; whether each ended well."""
        (self.scratch / "work").mkdir()
        beside = self.start(PREPARE, {**self.environment, "CUDA_VISIBLE_DEVICES": ""})
        processes = [self.start(PARTS[0], self.environment)]
        self.begin(beside, self._left())
        try:
            for part, following in itertools.zip_longest(PARTS, PARTS[1:]):
                process = processes[-1]
                seconds = min(self.patience * part.seconds, self._left())
                self.begin(process, seconds - GRACE)
                if following:  # It imports its libraries meanwhile.
                    processes.append(self.start(following, self.environment))
                self.wait(part, process, seconds, beside)
                self.end(process)
            self.wait(PREPARE, beside, self._left(), beside)
            self.found["parts"][PREPARE.name]["seconds"] = round(self.prepared_after, 1)
        finally:
            for process in (beside, *processes):
                self.end(process)
        self.write()
        return all(entry["outcome"] == "done" for entry in self.found["parts"].values())

    def wait(
        self, part: Part, process: subprocess.Popen[bytes], seconds: float, beside: subprocess.Popen[bytes]
    ) -> None:
        """Until a part has ended or its time is over, writing down what it and the one beside it have found."""
        began = time.monotonic()
        entry = self.found["parts"].setdefault(part.name, {})
        while process.poll() is None and time.monotonic() - began < seconds:
            time.sleep(0.2)
            self.collect()
            if not self.prepared_after and beside.poll() is not None:
                self.prepared_after = time.monotonic() - self.began
        code = process.poll()
        entry["seconds"] = round(time.monotonic() - began, 1)
        entry["outcome"] = "cut off" if code is None else "done" if code == 0 else f"failed with {code}"
        if code != 0:
            entry["log"] = (self.results / f"{part.name}.log").read_text(errors="replace")[-3000:]
        self.collect()
        self.write()
        print(f"{part.name}: {entry['outcome']} after {entry['seconds']} s", flush=True)
        if code != 0:
            print(entry["log"], flush=True)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and those that it started."""
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()

    def collect(self) -> None:
        """Take over what the parts have recorded, where that has changed."""
        texts = {
            part.name: self._record(part).read_text(encoding="utf-8")
            for part in (PREPARE, *PARTS)
            if self._record(part).exists()
        }
        if (joined := "".join(texts.values())) != self.seen:
            self.seen = joined
            self.found |= {name: json.loads(text) for name, text in texts.items()}
            self.write()

    def write(self) -> None:
        """The results and their tables, each complete or as before."""
        self.found["seconds"] = round(time.monotonic() - self.began, 1)
        for name, text in (
            ("results.json", json.dumps(self.found, indent=1)),
            ("table.md", markdown(self.found)),
        ):
            partial = self.results / (name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.results / name)

    def _record(self, part: Part) -> Path:
        return self.scratch / f"{part.name}.json"

    def _left(self) -> float:
        return self.patience * self.options.seconds - (time.monotonic() - self.began)


def scratch_place(small: bool) -> str | None:
    """In memory where the checkpoints fit, since they are read as soon as they are written; else the usual place."""
    shared = Path("/dev/shm")
    return (
        str(shared) if not small and shared.is_dir() and shutil.disk_usage(shared).free > IN_MEMORY else None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: the dry run")
    parser.add_argument("--seconds", type=int, default=TOTAL, help="for all parts; those cut off are named")
    parser.add_argument("--carried", type=Path, default=ROOT / "build/gpu", help="what wheels.py collected")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/gpu-check")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that parts end with the check.
    # Libraries cannot be loaded from memory that is mounted without the right to execute.
    with (
        tempfile.TemporaryDirectory(prefix="gpu-check-", dir=scratch_place(options.small)) as scratch,
        tempfile.TemporaryDirectory(prefix="gpu-check-site-") as site,
    ):
        check = Check(options, Path(scratch), Path(site), options.results.resolve())
        check.facts()
        well = check.run()
    print((options.results / "table.md").read_text(encoding="utf-8"))
    print(f"{check.found['seconds']} s; results in {options.results}")
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
