"""Which method and which signal earn their parameters: a study with several seeds, resumable.

    python -m tests.benchmarks.evidence --base-model DIR --data FILE.jsonl --output DIR [--jobs N]

For every arm (a method with its selection) one learning rate is chosen from a small grid on rows that the
study itself never sees; then every arm is trained with every seed on the same rows in the same order and
scored on the same held-out rows. Finished runs are kept in OUTPUT/runs.jsonl and not repeated. Two tables
come out: equal rank, and equal trainable parameters (those of plain QLoRA at rank 16).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (1, 2, 3)
TUNING_SEED = 0
RANK = 16
KAPPA = "kappa"


@dataclass(frozen=True)
class Arm:
    """A method with its selection settings; `tuned_as` names the arm whose learning rate it takes."""

    name: str
    method: str
    tuned_as: str
    select: dict[str, Any] = field(default_factory=dict)


def arms() -> dict[str, list[Arm]]:
    """Arms by table: `equal rank` and `equal parameters`."""
    equal_rank = [Arm("qlora", "qlora", "qlora")]
    for signal in ("spectrum", "energy"):
        equal_rank += [
            Arm(f"hybrid-50 {signal}", "hybrid", "hybrid-50", {"signal": signal}),
            Arm(f"hybrid-25 {signal}", "hybrid", "hybrid-50", {"signal": signal, "percent": 25}),
            Arm(f"alors {signal}", "alors", "alors", {"signal": signal}),
            Arm(f"sgm {signal}", "sgm", "sgm", {"signal": signal}),
        ]
    equal_rank += [
        Arm("hybrid-50 energy, all types", "hybrid", "hybrid-50", {"signal": "energy", "scope": "all"}),
        Arm("qlora, gradient start", "qlora", "qlora", {"gradient_init": "on"}),
        Arm(
            "hybrid-50 energy, random start",
            "hybrid",
            "hybrid-50",
            {"signal": "energy", "gradient_init": "off"},
        ),
        Arm("random-50, gradient start", "random", "hybrid-50", {"gradient_init": "on"}),
        Arm("random-50", "random", "hybrid-50"),
        Arm("condition number-50", KAPPA, "hybrid-50"),
    ]
    equal_parameters = [
        Arm(f"{a.name}, budget 1", a.method, a.tuned_as, {**a.select, "budget": 1.0})
        for a in equal_rank
        if a.method != "qlora" and not a.select.keys() & {"scope", "gradient_init"}
    ]
    return {"equal rank": equal_rank, "equal parameters": [equal_rank[0], *equal_parameters]}


@dataclass(frozen=True)
class Study:
    """Where the study's artifacts lie and what it trains."""

    base: str
    work: Path
    steps: int
    batch_size: int
    max_length: int
    compute_dtype: str

    def prepare(self, data: Path, rows: int, eval_rows: int) -> None:
        """Quantize, measure SNR, and prepare the tuning rows and the study's rows, none in both."""
        from spectraqlora.settings import DataSettings, ModelSettings, SnrSettings
        from spectraqlora.steps.prepare_data.prepare import prepare
        from spectraqlora.steps.quantize_load.quantize import quantize
        from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze

        if (self.work / "study" / "manifest.json").exists():
            return
        lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
        cut = len(lines) // 3
        for name in ("quantized", "outline", "table", "quantized-table", "tuning", "study"):
            shutil.rmtree(self.work / name, ignore_errors=True)
            (self.work / name).mkdir(parents=True)
        quantize(
            ModelSettings.model_validate({"base_model": self.base, "compute_dtype": self.compute_dtype}),
            self.work / "quantized",
            self.work / "outline",
        )
        inputs = Inputs(self.work / "outline", self.work / "quantized")
        analyze(inputs, SnrSettings(), self.work / "table")
        analyze(inputs, SnrSettings(source="quantized"), self.work / "quantized-table")
        for name, part in (("tuning", lines[:cut]), ("study", lines[cut:])):
            source = self.work / f"{name}.jsonl"
            source.write_text("".join(part), encoding="utf-8")
            settings = DataSettings(
                source=str(source),
                max_length=self.max_length,
                max_rows=rows,
                max_eval_rows=eval_rows,
                test_fraction=0,
            )
            prepare(settings, self.work / "outline", 0, self.work / name)

    def run(self, arm: Arm, rate: float, seed: int, split: str) -> dict[str, Any]:
        """Train one arm once; the result as one line of `runs.jsonl`."""
        from spectraqlora.models.adapters import with_adapter
        from spectraqlora.models.loading import load_four_bit
        from spectraqlora.scoring.batches import load_rows
        from spectraqlora.scoring.loss import score
        from spectraqlora.settings import EvaluateSettings, SelectSettings, TrainSettings
        from spectraqlora.steps.select_layers.select import Inputs, select
        from spectraqlora.steps.train.request import Inputs as TrainInputs
        from spectraqlora.steps.train.request import TrainRequest
        from spectraqlora.steps.train.training import train

        quantized, data = self.work / "quantized", self.work / split
        of_rank = {"rank": RANK, "rank_high": RANK, "rank_low": RANK // 2}
        settings = SelectSettings.model_validate(of_rank | arm.select)
        with tempfile.TemporaryDirectory() as scratch:
            ranks, adapter = Path(scratch) / "ranks", Path(scratch) / "adapter"
            ranks.mkdir()
            if arm.method == KAPPA:
                self._condition_number_map(settings, seed, ranks)
            else:
                measurement = self.measurement(settings, seed, split)
                inputs = Inputs(self.work / "outline", self.work / "table", measurement)
                select(arm.method, inputs, settings, seed, ranks)
            request = TrainRequest(
                TrainInputs(quantized, data, ranks),
                adapter,
                seed,
                train=TrainSettings(
                    max_steps=self.steps, batch_size=self.batch_size, learning_rate=rate, evaluations=1
                ),
                evaluate=EvaluateSettings(batch_size=32),
            )
            log = train(request)
            scored = score(
                with_adapter(load_four_bit(quantized)[0], adapter), load_rows(data, "held_out"), 32
            )
        return {
            "arm": arm.name,
            "rate": rate,
            "seed": seed,
            "split": split,
            "eval_loss": log.best_eval_loss,
            "row_losses": [round(loss, 4) for loss in scored.losses],
            "row_tokens": scored.tokens,
            "trainable_parameters": log.trainable_parameters,
            "tokens_per_second": log.train_tokens_per_second,
            "seconds": log.train_seconds,
        }

    def measurement(self, settings: Any, seed: int, split: str) -> Path:
        """The base's measurement with sketches, once for all arms of a seed; made in a folder of its own by each process."""
        from tests.measured import write_measurement

        folder = self.work / "measurements" / f"{split}-{seed}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = write_measurement(
                    self.work / "quantized", self.work / split, settings, seed, Path(scratch) / "own"
                )
                # Another process may have been faster: its numbers are the same.
                with contextlib.suppress(OSError):
                    made.rename(folder)
        return folder

    def _condition_number_map(self, settings: Any, seed: int, output: Path) -> None:
        """The half of all matrices that peft finds best conditioned."""
        import torch
        from peft.helpers import find_kappa_target_modules
        from spectraqlora.artifacts import FourBitModel
        from spectraqlora.methods.catalogue import method
        from spectraqlora.models.loading import load_plain

        manifest = FourBitModel.read(self.work / "quantized")
        model = load_plain(Path(self.base), torch.float32)
        chosen = find_kappa_target_modules(model, top_p=0.5, show_progress=False)["target_modules"]
        scores = {m.module: (1.0, 0.0) for m in manifest.modules if m.module in set(chosen)}
        everything = settings.model_copy(update={"percent": 100.0})
        rank_map = method("hybrid").first_ranks(manifest.modules, scores, everything, seed, {})
        rank_map.model_copy(update={"base_digest": manifest.base_digest}).write(output)


Key = tuple[str, float, int, str]
"""Arm, learning rate, seed and split of a run."""


def _begin_worker() -> None:
    """One thread, and no word, from each worker."""
    import torch

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


class Runs:
    """Finished runs in a JSON-lines file, and workers that add the missing ones."""

    def __init__(self, study: Study, jobs: int) -> None:
        self.study, self.jobs = study, jobs
        self.path = study.work / "runs.jsonl"

    def read(self) -> dict[Key, dict[str, Any]]:
        """Results by key."""
        if not self.path.exists():
            return {}
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {(r["arm"], r["rate"], r["seed"], r["split"]): r for r in rows}

    def complete(self, wanted: list[Key], by_name: dict[str, Arm]) -> None:
        """Run what is missing, `jobs` processes of one thread each at a time."""
        known = self.read()
        missing = [key for key in dict.fromkeys(wanted) if key not in known]
        began = time.monotonic()
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), _begin_worker) as pool:
            pending = [
                pool.submit(self.study.run, by_name[name], rate, seed, split)
                for name, rate, seed, split in missing
            ]
            for done, finished in enumerate(as_completed(pending), 1):
                row = finished.result()
                with open(self.path, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                left = (time.monotonic() - began) / done * (len(missing) - done)
                print(
                    f"[{done}/{len(missing)}] {row['arm']}, rate {row['rate']:g}, seed {row['seed']}: "
                    f"{row['eval_loss']:.4f}; about {left / 60:.0f} min left",
                    flush=True,
                )


def agreement(work: Path) -> str:
    """How far the SNR ranking of the 4-bit weights agrees with that of the original."""
    from scipy.stats import spearmanr
    from spectraqlora.snr.table import read_table, top_modules

    original, packed = read_table(work / "table"), read_table(work / "quantized-table")
    both = original.merge(packed, on="module", suffixes=("", "_4bit"))
    values = [spearmanr(part["snr"], part["snr_4bit"]).statistic for _, part in both.groupby("type")]
    lines = [
        f"Spearman correlation of SNR, 4-bit against original, mean over types: {statistics.mean(values):.3f}"
    ]
    for percent in (25, 50):
        one, two = top_modules(original, percent), top_modules(packed, percent)
        lines.append(f"top {percent} % per type: {len(one & two)} of {len(one)} modules the same")
    return "\n".join(lines)


def table(name: str, members: list[Arm], results: list[dict[str, Any]], base: float) -> str:
    """A Markdown table, best mean first."""
    control = statistics.mean(r["eval_loss"] for r in results if r["arm"] == "qlora")
    rows = []
    for arm in members:
        own = [r for r in results if r["arm"] == arm.name]
        losses = [r["eval_loss"] for r in own]
        rows.append(
            (
                statistics.mean(losses),
                f"| {arm.name} | {statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f} | "
                f"{statistics.mean(losses) / control - 1:+.1%} | {own[0]['trainable_parameters']:,} | "
                f"{own[0]['rate']:g} | {statistics.mean(r['tokens_per_second'] for r in own):,.0f} |",
            )
        )
    head = [
        f"**{name}** ({len(SEEDS)} seeds, mean ± standard deviation; base {base:.4f})",
        "",
        "| arm | eval loss | against qlora | trained parameters | learning rate | tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(row for _, row in sorted(rows))])


def study_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a study; `defaults` by their names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--data", required=True, type=Path, help=".jsonl with prompts and answers")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens; longer rows are dropped")
    parser.add_argument("--rows", type=int, default=4000, help="rows of each of both splits")
    parser.add_argument("--eval-rows", type=int, default=128)
    parser.add_argument("--compute-dtype", default="auto", help="bfloat16 is faster on CPUs with AMX")
    parser.add_argument("--jobs", type=int, default=3, help="processes of one thread each")
    parser.set_defaults(**defaults)
    return parser


def prepared_study(options: argparse.Namespace) -> Study:
    """The study that the options name, its model and rows prepared."""
    study = Study(
        options.base_model,
        options.output,
        options.steps,
        options.batch_size,
        options.max_length,
        options.compute_dtype,
    )
    study.prepare(options.data, options.rows, options.eval_rows)
    return study


def main() -> None:
    options = study_parser(__doc__).parse_args()
    study = prepared_study(options)
    tables = arms()
    by_name = {arm.name: arm for members in tables.values() for arm in members}
    runs = Runs(study, options.jobs)
    representatives = {arm.tuned_as: arm.name for arm in reversed(tables["equal rank"])}
    tuning = [
        (name, rate, TUNING_SEED, "tuning") for name in representatives.values() for rate in LEARNING_RATES
    ]
    runs.complete(tuning, by_name)
    known = runs.read()
    rates = {
        tuned_as: min(LEARNING_RATES, key=lambda r: known[name, r, TUNING_SEED, "tuning"]["eval_loss"])
        for tuned_as, name in representatives.items()
    }
    print("learning rates:", rates, flush=True)
    wanted = [(arm.name, rates[arm.tuned_as], seed, "study") for seed in SEEDS for arm in by_name.values()]
    runs.complete(wanted, by_name)
    known = runs.read()
    results = [known[key] for key in wanted]

    from spectraqlora.models.loading import load_four_bit
    from spectraqlora.scoring.batches import load_rows
    from spectraqlora.scoring.loss import score

    base = score(
        load_four_bit(study.work / "quantized")[0], load_rows(study.work / "study", "held_out"), 32
    ).loss
    text = "\n\n".join([*(table(n, m, results, base) for n, m in tables.items()), agreement(study.work)])
    (study.work / "evidence.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
