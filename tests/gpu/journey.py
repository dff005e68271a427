"""The steps of a small run, by their own functions, on whatever device this process sees.

    python -m tests.gpu.journey --work FOLDER --output FOLDER [--small]

As a program it repeats measurement, selection, training and evaluation of a run whose 4-bit model, rows, table and
rank maps are there already. The tests start it with the GPU hidden, and compare both.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from spectraqlora.artifacts import Evaluation, MergedModel, RankMap, TrainingLog
from spectraqlora.methods.catalogue import METHODS
from spectraqlora.settings import (
    CheckpointSettings,
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    SelectSettings,
    SnrSettings,
    TrainSettings,
)

from tests.gpu.wheels import MODEL

SEED = 3
ComputeType = Literal["float32", "bfloat16"]
EVALUATE = EvaluateSettings(accuracy_rows=4, max_new_tokens=4)


class Journey:
    """Where a small run's artifacts are, and the steps that make them.

    Args:
        work: folder of what both devices share: base, rows, table and rank maps.
        output: folder of what one of them makes.
        small: fewer steps, for the dry run.
    """

    def __init__(self, work: Path, output: Path, small: bool) -> None:
        self.work, self.output = work, output
        self.select = SelectSettings(
            rank=8, rank_high=8, rank_low=4, calibration_batches=2 if small else 4, calibration_rows=4
        )
        self.train_settings = TrainSettings(
            max_steps=4 if small else 20, batch_size=4 if small else 8, evaluations=1
        )
        self.questions_of = 12 if small else 60

    @property
    def four_bit(self) -> Path:
        return self.work / "four_bit"

    @property
    def outline(self) -> Path:
        return self.work / "outline"

    @property
    def rows(self) -> Path:
        return self.work / "rows"

    @property
    def measurement(self) -> Path:
        return self.output / "measurement"

    def rank_map(self, method: str) -> Path:
        """The map that both devices train."""
        return self.work / "rank_map" / method

    def adapter(self, name: str) -> Path:
        return self.output / "adapter" / name

    def evaluation(self, name: str) -> Path:
        return self.output / "evaluation" / name

    def quantize(self, compute_dtype: ComputeType) -> None:
        """quantize-load."""
        from spectraqlora.steps.quantize_load.quantize import quantize

        self.work.mkdir(parents=True)
        settings = ModelSettings(base_model=str(base_model(self.work)), compute_dtype=compute_dtype)
        quantize(settings, self.four_bit, self.outline)

    def prepare(self) -> None:
        """prepare-data and snr-analyze."""
        from spectraqlora.sample import world
        from spectraqlora.steps.prepare_data.prepare import prepare
        from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze

        questions = world.questions(world.people(0, self.questions_of), 0)
        source = self.work / "data.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in questions))
        self.rows.mkdir()
        prepare(DataSettings(source=str(source), test_fraction=0), self.outline, SEED, self.rows)
        (self.work / "table").mkdir()
        analyze(Inputs(self.outline), SnrSettings(), self.work / "table")

    def measure(self) -> None:
        """measure-base for every method."""
        from spectraqlora.steps.measure_base.measure import Inputs, measure_base

        self.measurement.mkdir(parents=True)
        inputs = Inputs(self.four_bit, self.rows)
        measure_base(inputs, list(METHODS), self.select, EVALUATE, SEED, self.measurement)

    def select_layers(self, method: str, output: Path) -> RankMap:
        """select-layers, from this device's measurement."""
        from spectraqlora.steps.select_layers.select import Inputs, select

        output.mkdir(parents=True)
        inputs = Inputs(self.outline, self.work / "table", self.measurement)
        return select(method, inputs, self.select, SEED, output)

    def train(
        self,
        method: str,
        name: str = "",
        settings: TrainSettings | None = None,
        checkpoint: CheckpointSettings | None = None,
        on_metric: Callable[[str, int, float], None] = lambda name, step, value: None,
    ) -> TrainingLog:
        """train, into the adapter of this name."""
        from spectraqlora.steps.train.request import Inputs, TrainRequest
        from spectraqlora.steps.train.training import train

        output = self.adapter(name or method)
        output.mkdir(parents=True, exist_ok=True)
        request = TrainRequest(
            Inputs(self.four_bit, self.rows, self.rank_map(method)),
            output,
            SEED,
            train=settings or self.train_settings,
            evaluate=EVALUATE,
        )
        return train(replace(request, checkpoint=checkpoint) if checkpoint else request, on_metric)

    def evaluate(self, method: str) -> Evaluation:
        """re-evaluate after the last round."""
        from spectraqlora.steps.re_evaluate.evaluate import Inputs, Outputs, Sections, re_evaluate

        outputs = Outputs(
            *(self.output / kind / method for kind in ("evaluation", "next_rank_map", "next_adapter"))
        )
        for folder in vars(outputs).values():
            folder.mkdir(parents=True)
        inputs = Inputs(
            self.four_bit,
            self.rows,
            self.rank_map(method),
            self.adapter(method),
            self.work / "table",
            self.measurement,
        )
        return re_evaluate(inputs, outputs, Sections(EVALUATE, self.select, SnrSettings()), 1, 1, SEED)

    def merge(self) -> MergedModel:
        """compare, and merge-export of its winner."""
        from spectraqlora.steps.compare.comparison import Inputs, compare
        from spectraqlora.steps.merge_export.merge import Inputs as MergeInputs
        from spectraqlora.steps.merge_export.merge import merge_export

        folders = {name: self.output / name for name in ("leaderboard", "winner", "exported")}
        for folder in folders.values():
            folder.mkdir()
        inputs = Inputs(
            self.outline,
            self.rows,
            self.work / "table",
            evaluations={method: self.evaluation(method) for method in METHODS},
            adapters={method: self.adapter(method) for method in METHODS},
        )
        compare(inputs, folders["leaderboard"], folders["winner"], self.output / "report.html")
        inputs_of_merge = MergeInputs(self.four_bit, self.rows, folders["winner"])
        return merge_export(inputs_of_merge, EVALUATE, folders["exported"])


def base_model(folder: Path) -> Path:
    """The tests' small model where it is at hand, else a random Llama of width 128."""
    if given := os.environ.get(MODEL):
        return Path(given)
    import torch
    from spectraqlora.sample import make, world
    from transformers import LlamaForCausalLM

    from tests.gpu.shapes import SMALL

    made = folder / "base"
    tokenizer = make._tokenizer(world.corpus(world.people(0, 12), 0, 300))
    torch.manual_seed(0)
    LlamaForCausalLM(SMALL.model.config()).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    journey = Journey(options.work, options.output, options.small)
    journey.measure()
    for method in METHODS:
        journey.select_layers(method, journey.output / "rank_map" / method)
        journey.train(method)
        journey.evaluate(method)


if __name__ == "__main__":
    main()
