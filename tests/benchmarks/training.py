"""Speed and memory of training part of the layers, against plain PEFT QLoRA on all of them.

    python -m tests.benchmarks.training [--steps N] [--repeats N] [--layers N --width N ...]

Both sides train the same 4-bit Llama of random weights on the same random rows with transformers.Trainer,
each in a process of its own. The peer is what people write by hand: `prepare_model_for_kbit_training`
with its defaults, LoRA on all linear layers, the model's own loss.

Speed: the sides take turns; a ratio is that of two neighbours in time, and the table gives the median and the
range of `--repeats` of them, by the clock and by processor seconds, which other work on the machine moves less.
Memory: the peak during training above what the process held once model and libraries were loaded; resident
memory on the CPU, in runs of their own in which the allocator returns what is freed; allocated on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEER = "peft, all layers"
SIDES = {
    PEER: None,
    "qlora": {"method": "qlora"},
    "hybrid-50": {"method": "hybrid", "percent": 50},
    "hybrid-25": {"method": "hybrid", "percent": 25},
    "hybrid-50, recomputing some": {"method": "hybrid", "percent": 50, "recompute": "some"},
    "hybrid-25, recomputing some": {"method": "hybrid", "percent": 25, "recompute": "some"},
    "hybrid-25, recomputing all": {"method": "hybrid", "percent": 25, "recompute": "on"},
}


def make_model(folder: Path, options: argparse.Namespace) -> int:
    """Write the model's 4-bit and SNR artifacts; returns its parameter count."""
    import torch
    from spectraqlora.sample import make, world
    from spectraqlora.settings import ModelSettings, SnrSettings
    from spectraqlora.steps.quantize_load.quantize import quantize
    from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=options.inner,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            num_key_value_heads=max(1, options.width // 256),
            tie_word_embeddings=True,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder / "base")
    make._tokenizer(world.corpus(world.people(0, 12), 0, 300)).save_pretrained(folder / "base")
    for name in ("quantized", "table"):
        (folder / name).mkdir()
    settings = ModelSettings(base_model=str(folder / "base"))
    parameters = quantize(settings, folder / "quantized", folder / "outline").parameters
    analyze(Inputs(folder / "outline"), SnrSettings(), folder / "table")
    return parameters


def rows(options: argparse.Namespace, count: int) -> list[dict[str, list[int]]]:
    """Random rows of full length, every token counted."""
    import torch

    ids = torch.randint(
        3, options.vocabulary, (count, options.tokens), generator=torch.Generator().manual_seed(0)
    )
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]


def resident_peak() -> int:
    """Peak resident memory since the last reset, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Meter:
    """Peak memory above a starting point, and seconds of the steps after the first."""

    def __init__(self) -> None:
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
        import torch
        from peft import get_peft_model  # noqa: F401
        from transformers import Trainer  # noqa: F401

        # Libraries are imported by now: their code is no memory of the training.
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = resident_peak()
        self.times: list[tuple[float, float]] = []

    def tick(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))

    def result(self) -> dict[str, float]:
        import torch

        peak = torch.cuda.max_memory_allocated() if self.cuda else resident_peak()
        wall, cpu = ((self.times[-1][i] - self.times[0][i]) / (len(self.times) - 1) for i in (0, 1))
        return {"memory": peak - self.start, "seconds": wall, "cpu_seconds": cpu}


def load(folder: Path) -> Any:
    """The 4-bit model, read from disk to the last byte: weights are mapped, and would else count as training's."""
    from spectraqlora.models.loading import load_four_bit

    model, _ = load_four_bit(folder / "quantized")
    for parameter in model.parameters():
        parameter.detach().clone()
    return model


def run_peer(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Plain PEFT as its documentation shows it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from spectraqlora.scoring.batches import Collator
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = load(folder)
    meter = Meter()
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.tick()

    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=1e-4,
                activation_checkpointing=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows(options, options.batch * options.steps),
            data_collator=Collator.of(model.config),
            callbacks=[Tick()],
        ).train()
    return {**meter.result(), "trainable": _trainable(model)}


def run_ours(folder: Path, options: argparse.Namespace, side: dict[str, Any]) -> dict[str, float]:
    """The train step's own code, timed by the points of its loss curve."""
    from datasets import Dataset
    from spectraqlora.artifacts import FourBitModel
    from spectraqlora.methods.catalogue import method
    from spectraqlora.models import adapters
    from spectraqlora.settings import EvaluateSettings, SelectSettings, TrainSettings
    from spectraqlora.signals.scores import weight_scores
    from spectraqlora.snr.table import read_table
    from spectraqlora.steps.train.request import Inputs, TrainRequest
    from spectraqlora.steps.train.training import fit

    from tests.random_rows import write_manifest

    manifest = FourBitModel.read(folder / "quantized")
    settings = SelectSettings(rank=16, percent=side.get("percent", 100))
    scores = weight_scores(read_table(folder / "table"))
    ranks = method(side["method"]).first_ranks(manifest.modules, scores, settings, 0, {})
    ranks = ranks.model_copy(update={"base_digest": manifest.base_digest})
    data = Path(tempfile.mkdtemp(dir=folder))
    Dataset.from_list(rows(options, options.batch * options.steps)).save_to_disk(str(data / "train"))
    Dataset.from_list(rows(options, 1)).save_to_disk(str(data / "held_out"))
    write_manifest(data, options.batch * options.steps, 1, options.tokens)
    model = load(folder)
    meter = Meter()
    model = adapters.attach(model, ranks)
    trainable = adapters.trainable_parameters(model)
    plan = TrainSettings(
        max_steps=options.steps,
        batch_size=options.batch,
        evaluations=1,
        gradient_checkpointing=side.get("recompute", "auto"),
    )
    inputs = Inputs(folder / "quantized", data, folder / "rank_map")
    request = TrainRequest(
        inputs, folder / "adapter", seed=0, train=plan, evaluate=EvaluateSettings(batch_size=1)
    )

    def tick(curve: str, step: int, value: float) -> None:
        if curve == "train_loss":
            meter.tick()

    fit(model, ranks, request, on_metric=tick)
    return {**meter.result(), "trainable": trainable}


def _trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="the first is not timed")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs behind each speed")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        with contextlib.redirect_stdout(io.StringIO()):
            side = SIDES[options.side]
            found = run_ours(options.folder, options, side) if side else run_peer(options.folder, options)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stdout(io.StringIO()):
            parameters = make_model(Path(scratch), options)
        print(
            f"Llama of {parameters / 1e6:.0f}M parameters, {options.batch} x {options.tokens} tokens a step"
        )
        memory = {name: _process(name, scratch, ["--steps", "2"], RETURN_FREED) for name in SIDES}
        for name, run in memory.items():
            print(f"{name}: {run['memory'] / 2**20:,.0f} MiB above the model", flush=True)
        speed: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        for _ in range(options.repeats):
            for name in SIDES:
                peer = _process(PEER, scratch) if name != PEER else {}
                found = _process(name, scratch)
                speed[name].append(found | {f"peer {key}": value for key, value in peer.items()})
    tokens = options.batch * options.tokens
    print("| side | trained parameters | tokens/s | speed, x peer | by cpu time | MiB | x peer |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, found in speed.items():
        middle = tokens / statistics.median(run["seconds"] for run in found)
        used = memory[name]["memory"]
        print(
            f"| {name} | {found[0]['trainable']:,} | {middle:,.0f} | {_ratio(found, 'seconds')} | "
            f"{_ratio(found, 'cpu_seconds')} | {used / 2**20:,.0f} | {used / memory[PEER]['memory']:.2f} |"
        )


RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc: whatever is larger than this many bytes lies in pages of its own, given back when it is freed."""


def _process(
    side: str, folder: str, more: Sequence[str] = (), environment: dict[str, str] | None = None
) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.training", *sys.argv[1:], *more]
    command += ["--side", side, "--folder", folder]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | (environment or {})
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ratio(runs: list[dict[str, float]], key: str) -> str:
    """Median and range of how many times faster than the peer beside it."""
    ratios = sorted(run[f"peer {key}"] / run[key] for run in runs if f"peer {key}" in run)
    if not ratios:
        return "1"
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
