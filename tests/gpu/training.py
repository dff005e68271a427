"""Part c: optimizer steps of an 8B-shaped model in 4 bits, ours and QLoRA as its documentation writes it.

A few of its layers first, then the complete model. Every number is that of full rows: tokens/s from the steps after
the first, and the peak of what the card has allocated, weights included. The peer is QLoRA as the guides of PEFT and
Trainer put it together: `prepare_model_for_kbit_training` with its defaults, LoRA on all linear layers, bfloat16
autocast, Trainer's own loss and optimizer.
"""

from __future__ import annotations

import functools
import gc
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from spectraqlora.artifacts import RankMap
from spectraqlora.models import adapters
from spectraqlora.models.hardware import device
from spectraqlora.models.loading import load_four_bit
from spectraqlora.runtime.console import quiet
from spectraqlora.scoring.batches import Collator
from spectraqlora.settings import EvaluateSettings, ModelSettings, TrainSettings
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora.steps.train.request import Inputs, TrainRequest
from spectraqlora.steps.train.training import fit

from tests.gpu.prepare import SIDES, wait_for
from tests.gpu.record import Meter, Part, metered, part, timed
from tests.gpu.shapes import Sizes, sizes
from tests.random_rows import write_manifest

OnStep = Callable[[int], None]
"""Called with the number of an optimizer step that has ended."""
PEER = "peft"
MARGIN = 1.5
"""A training begins where this many times what one like it took is left."""


def write_rows(folder: Path, chosen: Sizes) -> None:
    """Random rows of full length for the longest training, every token counted, and a short row held out."""

    def write(split: str, count: int, tokens: int) -> None:
        ids = torch.randint(
            3, chosen.model.vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0)
        )
        listed = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
        Dataset.from_list(listed).save_to_disk(str(folder / split))

    count = max(batch * (chosen.steps(batch) + 1) for batch in chosen.batches)
    write("train", count, chosen.tokens)
    write("held_out", 1, 8)
    write_manifest(folder, count, 1, chosen.tokens)


def run_ours(model: Any, rank_map: Path, rows: Path, batch: int, steps: int, on_step: OnStep) -> int:
    """Train with the train step's own function; returns the trained parameters.

    One step more than `steps`, which is not reported: an evaluation follows it.
    """
    ranks = RankMap.read(rank_map)
    wrapped = adapters.attach(model, ranks)
    request = TrainRequest(
        Inputs(Path(), rows, rank_map),
        Path(),
        seed=0,
        train=TrainSettings(max_steps=steps + 1, batch_size=batch, evaluations=1),
        evaluate=EvaluateSettings(batch_size=1),
    )

    def on_metric(curve: str, step: int, value: float) -> None:
        if curve == "train_loss" and step <= steps:
            on_step(step)

    with quiet():
        fit(wrapped, ranks, request, on_metric=on_metric)
    trained = adapters.trainable_parameters(wrapped)
    wrapped.unload()
    return trained


def as_documented(model: Any) -> Any:
    """A 4-bit model made ready for QLoRA on all linear layers as PEFT's guide to quantization says."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def run_peer(wrapped: Any, rows: Path, batch: int, steps: int, on_step: OnStep) -> int:
    """Train `steps` steps with transformers.Trainer as its guide says; returns the trained parameters."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on_step(state.global_step)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=wrapped,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=1e-4,
                activation_checkpointing=True,
                bf16=device() == "cuda",
                use_cpu=device() == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.load_from_disk(str(rows / "train")),
            data_collator=Collator.of(wrapped.config),
            callbacks=[Tick()],
        )
        trainer.train()
    return adapters.trainable_parameters(wrapped)


class Stage:
    """One model: its 4-bit artifact, its rank maps, and what was trained of it.

    Args:
        name: of the stage's folder.
        given: to the part.
    """

    def __init__(self, name: str, given: Part) -> None:
        self.name, self.given = name, given
        self.folder, self.rows = given.work / name, given.work / "rows"
        self.spent: dict[int, float] = {}
        self.model: Any = None
        self.failures = 0

    def quantize(self) -> None:
        """Make the 4-bit artifact as quantize-load does."""
        four_bit, outline = self.folder / "four_bit", self.folder / "outline"
        four_bit.mkdir()
        outline.mkdir()
        with timed() as meter:
            manifest = quantize(ModelSettings(base_model=str(self.folder / "base")), four_bit, outline)
        found = {"seconds": meter.seconds(), "peak_bytes": meter.peak, "parameters": manifest.parameters}
        self.given.record.add("quantize", {"stage": self.name, **found})
        shutil.rmtree(self.folder / "base")

    def load(self) -> Any:
        """The 4-bit model, of which nothing else is left on the card."""
        self.model = None
        _free()
        self.model, _ = load_four_bit(self.folder / "four_bit")
        return self.model

    def measure(self, side: str, batch: int, train: Callable[[OnStep], int]) -> bool:
        """Train, and record it; whether the model may be used again."""
        like = max((seconds * batch / other for other, seconds in self.spent.items()), default=0.0)
        if self.given.left() < MARGIN * like:
            self._add(side, batch, {"skipped": "no time left"})
            return True
        began = time.monotonic()
        try:
            with metered() as meter:
                trained = train(lambda _: meter.tick())
        except torch.OutOfMemoryError:
            self._add(side, batch, {"skipped": "out of memory"})
            return False
        except Exception as error:
            # The other sides have their own turn: time on a GPU is rare.
            traceback.print_exc()
            self.failures += 1
            self._add(side, batch, {"skipped": f"failed, {type(error).__name__}: {error}"[:300]})
            return False
        self.spent[batch] = max(self.spent.get(batch, 0.0), time.monotonic() - began)
        self._add(side, batch, {"trained_parameters": trained, **self._numbers(batch, meter)})
        _free()
        return True

    def _numbers(self, batch: int, meter: Meter) -> dict[str, float]:
        seconds = meter.seconds()
        tokens = batch * sizes(self.given.small).tokens
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "start_bytes": meter.start,
            "peak_bytes": meter.peak,
        }

    def _add(self, side: str, batch: int, numbers: dict[str, Any]) -> None:
        self.given.record.add("rows", {"stage": self.name, "side": side, "batch": batch, **numbers})


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_peer_of(stage: Stage, chosen: Sizes, batches: tuple[int, ...]) -> None:
    """The peer on every batch size that fits; it changes the model that it trains."""
    wrapped = as_documented(stage.load())
    for batch in batches:
        train = functools.partial(run_peer, wrapped, stage.rows, batch, chosen.steps(batch))
        if not stage.measure(PEER, batch, train):
            return


def run_ours_of(stage: Stage, chosen: Sizes, batches: tuple[int, ...]) -> None:
    """Our sides, one batch size after the other."""
    stage.load()
    for batch in batches:
        for side in SIDES:
            rank_map = stage.folder / "rank_map" / side
            train = functools.partial(run_ours, stage.model, rank_map, stage.rows, batch, chosen.steps(batch))
            if not stage.measure(side, batch, train):
                del train
                stage.load()


def run(given: Part) -> None:
    chosen = sizes(given.small)
    write_rows(given.work / "rows", chosen)
    failures = 0
    for name in chosen.stages:
        wait_for(name, given)
        stage = Stage(name, given)
        stage.quantize()
        # The smaller model is there for a check that is cut off before the complete one.
        batches = chosen.batches[:2] if name == "part" else chosen.batches
        run_peer_of(stage, chosen, batches)
        run_ours_of(stage, chosen, batches)
        failures += stage.failures
    if failures:
        raise SystemExit(f"{failures} trainings failed")


if __name__ == "__main__":
    with part(__doc__) as given:
        run(given)
