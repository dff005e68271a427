"""Trainings side by side on one machine: threads as a step bounds them, against a thread per core for each.

    python -m tests.benchmarks.threads --base-model DIR [--repeats 3] [--seconds 10]

Every side trains the same adapters in one or two processes at the same time; what is timed is the part in which all
of them train. Sides run in turns, and a ratio is that to the side `alone` of the same turn: by the clock, and by
processor seconds, which other work on the machine moves less. The machine should run no other step meanwhile.

    alone                one training with a thread per core
    two, unbounded       two trainings, each with a thread per core: what torch takes by itself
    two, bounded         two trainings that share the cores, as steps on one machine do
    second comes later   as before, but one has trained alone for a while and had all cores
    two, promised        two trainings that were promised a core each, as by a cluster's cpu request
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
EACH: dict[str, str] = {"OMP_NUM_THREADS": str(CORES)}
PROMISED: dict[str, str] = {"SPECTRAQLORA_CPUS": str(max(1, CORES // 2))}
SIDES: dict[str, list[dict[str, str]]] = {
    "alone": [{}],
    "two, unbounded": [EACH, EACH],
    "two, bounded": [{}, {}],
    "second comes later": [{}, {}],
    "two, promised": [PROMISED, PROMISED],
}
LATER = "second comes later"
FIRST_TIMED = 3
"""The step before which all processes wait for each other."""
MANY_STEPS = 100
"""More than are ever timed: a training ends with the time it is given."""


def make_inputs(folder: Path, base_model: str) -> None:
    """Write the 4-bit model, its rows and a rank map that adapts every matrix."""
    from spectraqlora.artifacts import FourBitModel
    from spectraqlora.methods.catalogue import method
    from spectraqlora.sample import world
    from spectraqlora.settings import DataSettings, ModelSettings, SelectSettings
    from spectraqlora.steps.prepare_data.prepare import prepare
    from spectraqlora.steps.quantize_load.quantize import quantize

    for name in ("four_bit", "outline", "rows", "rank_map"):
        (folder / name).mkdir()
    questions = world.questions(world.people(0, 12), 0) * 40
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    quantize(ModelSettings(base_model=base_model), folder / "four_bit", folder / "outline")
    prepare(DataSettings(source=str(folder / "data.jsonl")), folder / "outline", 1, folder / "rows")
    base = FourBitModel.read(folder / "four_bit")
    rank_map = method("qlora").first_ranks(base.modules, {}, SelectSettings(), 1, {})
    rank_map.model_copy(update={"base_digest": base.base_digest}).write(folder / "rank_map")


def train_for(folder: Path, name: str, seconds: float) -> None:
    """Train as the step does; print seconds and processor seconds a step of the time when all processes trained."""
    from spectraqlora.runtime.threads import bound_threads

    bound_threads()
    import torch
    from spectraqlora.settings import TrainSettings
    from spectraqlora.steps.train.request import Inputs, TrainRequest
    from spectraqlora.steps.train.training import train

    ticks: list[tuple[float, float, int]] = []

    def on_metric(curve: str, step: int, value: float) -> None:
        if curve != "train_loss" or step < FIRST_TIMED:
            return
        if step == FIRST_TIMED:
            (folder / f"{name}.ready").touch()
            while not (folder / "go").exists():
                time.sleep(0.001)
        ticks.append((time.perf_counter(), time.process_time(), torch.get_num_threads()))
        if ticks[-1][0] - ticks[0][0] > seconds or step == MANY_STEPS - 1:
            wall, cpu = ((ticks[-1][i] - ticks[0][i]) / (len(ticks) - 1) for i in (0, 1))
            threads = ticks[len(ticks) // 2][2]
            print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "threads": threads}), flush=True)
            os._exit(0)

    inputs = Inputs(folder / "four_bit", folder / "rows", folder / "rank_map")
    plan = TrainSettings(max_steps=MANY_STEPS, evaluations=1)
    train(TrainRequest(inputs, folder / f"adapter-{name}", seed=1, train=plan), on_metric)


def run_side(side: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each process of a side measured."""
    for path in (*folder.glob("*.ready"), folder / "go"):
        path.unlink(missing_ok=True)
    environment = {name: text for name, text in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment["TMPDIR"] = str(folder)
    command = [sys.executable, "-m", "tests.benchmarks.threads", "--base-model", "", "--folder", str(folder)]
    command += ["--seconds", str(options.seconds), "--process"]
    processes: list[subprocess.Popen[str]] = []
    for index, variables in enumerate(SIDES[side]):
        processes.append(
            subprocess.Popen(
                [*command, str(index)],
                env=environment | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        while side == LATER and not (folder / "0.ready").exists():
            time.sleep(0.01)
    while len(list(folder.glob("*.ready"))) < len(processes):
        if any(process.poll() for process in processes):
            raise SystemExit(f"{side}: a training failed")
        time.sleep(0.01)
    (folder / "go").touch()
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-model", required=True, help="a folder, or a hub id")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="timed, of each side")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        train_for(options.folder, options.process, options.seconds)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_inputs(Path(scratch), options.base_model)
        turns: list[dict[str, list[dict[str, Any]]]] = []
        for _ in range(options.repeats):
            turns.append({})
            for side in SIDES:
                turns[-1][side] = run_side(side, Path(scratch), options)
                print(f"{side}: {json.dumps(turns[-1][side])}", file=sys.stderr, flush=True)
    print(f"{CORES} cores")
    print("| side | threads | s a step | x alone | CPU s a step | x alone |")
    print("| --- | --- | --- | --- | --- | --- |")
    for side in SIDES:
        cells = [" + ".join(str(process["threads"]) for process in turns[-1][side])]
        for key in ("seconds", "cpu_seconds"):
            slowest = [max(process[key] for process in turn[side]) for turn in turns]
            ratios = sorted(value / turn["alone"][0][key] for value, turn in zip(slowest, turns, strict=True))
            cells.append(f"{statistics.median(slowest):.2f}")
            cells.append(f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
        print(f"| {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
