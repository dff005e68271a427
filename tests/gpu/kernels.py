"""Part d: where the time of one optimizer step goes, kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from spectraqlora.models.hardware import device
from spectraqlora.models.loading import load_four_bit
from torch.autograd import DeviceType

from tests.gpu.record import Part, part
from tests.gpu.shapes import sizes
from tests.gpu.training import run_ours

PROFILED = ("qlora", "hybrid-25")
TOP = 25
"""Kernels that are listed."""


def profiled(model: Any, rank_map: Path, rows: Path, batch: int) -> Any:
    """The profile of the second step of a training."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device() == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])

    def on_step(step: int) -> None:
        if cuda:
            torch.cuda.synchronize()
        if step == 1:
            profiler.start()
        elif step == 2:
            profiler.stop()

    run_ours(model, rank_map, rows, batch, 2, on_step)
    return profiler.key_averages()


def run(given: Part) -> None:
    chosen = sizes(given.small)
    made = [name for name in chosen.stages if (given.work / name / "four_bit" / "manifest.json").exists()]
    if not made:
        raise SystemExit("no 4-bit model was made by the part before")
    stage = given.work / made[-1]
    model, _ = load_four_bit(stage / "four_bit")
    key = "self_device_time_total" if device() == "cuda" else "self_cpu_time_total"
    kind = DeviceType.CUDA if device() == "cuda" else DeviceType.CPU
    for side in PROFILED:
        averages = profiled(model, stage / "rank_map" / side, given.work / "rows", chosen.batches[0])
        # Time on the card stands with its kernel, and once more with the operation that launched it.
        own = [event for event in averages if event.device_type == kind and not event.is_user_annotation]
        spent = sorted(own, key=lambda event: getattr(event, key), reverse=True)
        total = sum(getattr(event, key) for event in spent)
        text = averages.table(sort_by=key, row_limit=TOP, max_name_column_width=70)
        given.record.add(
            "profiles",
            {
                "stage": made[-1],
                "side": side,
                "batch": chosen.batches[0],
                "milliseconds": total / 1000,
                "top": [
                    {
                        "name": event.key,
                        "calls": event.count,
                        "milliseconds": getattr(event, key) / 1000,
                        "share": getattr(event, key) / total,
                    }
                    for event in spent[:TOP]
                ],
            },
        )
        given.record.put(f"table, {side}", text)
        print(text, flush=True)


if __name__ == "__main__":
    with part(__doc__) as given:
        run(given)
