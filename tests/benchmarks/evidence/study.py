"""One study: a model, a task, its rows in four parts, and the training and scoring of one arm.

Rows that choose a learning rate are the first third of the data, and nothing else is made of them. Of the others some
are held out, which choose the checkpoint, and some are test rows, which choose nothing and are reported.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.evidence.arms import CONDITION_NUMBER, RANK, Arm

if TYPE_CHECKING:
    from spectraqlora.artifacts import LinearModule, RankMap
    from spectraqlora.settings import SelectSettings

TUNING, STUDY = "tuning", "study"
_BATCH = 32
"""Rows of a pass that only scores."""


def parts(lines: list[str], tested: list[str]) -> dict[str, dict[str, list[str]]]:
    """Rows by part and split, none in two of them; test rows are the last tenth of the lines where none are given."""
    third, last = len(lines) // 3, len(lines) if tested else len(lines) * 9 // 10
    return {
        TUNING: {"train": lines[:third]},
        STUDY: {"train": lines[third:last], "test": tested or lines[last:]},
    }


@dataclass(frozen=True)
class Study:
    """Where the study's artifacts lie and what it trains."""

    base: str
    work: Path
    steps: int
    batch_size: int
    max_length: int
    compute_dtype: str

    def prepare(self, data: Path, test_data: Path | None, eval_rows: int, test_rows: int) -> None:
        """Quantize, measure SNR, and prepare the rows; nothing where that was done.

        Args:
            data: .jsonl with prompts and answers.
            test_data: another one, whose rows are tested on; none takes the last tenth of `data`.
            eval_rows: held-out rows, at most.
            test_rows: test rows, at most.
        """
        from spectraqlora.settings import DataSettings, SnrSettings
        from spectraqlora.steps.prepare_data.prepare import prepare
        from spectraqlora.steps.quantize_load.quantize import quantize
        from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze

        if (self.work / STUDY / "manifest.json").exists():
            return
        for name in ("quantized", "outline", "table", "rows", TUNING, STUDY):
            shutil.rmtree(self.work / name, ignore_errors=True)
            (self.work / name).mkdir(parents=True)
        quantize(self._model_settings(self.base), self.work / "quantized", self.work / "outline")
        analyze(Inputs(self.work / "outline", self.work / "quantized"), SnrSettings(), self.work / "table")
        lines, tested = (
            path.read_text(encoding="utf-8").splitlines(keepends=True) if path else []
            for path in (data, test_data)
        )
        for name, files in parts(lines, tested).items():
            source = self.work / "rows" / name
            source.mkdir()
            for split, part in files.items():
                (source / f"{split}.jsonl").write_text("".join(part), encoding="utf-8")
            settings = DataSettings(
                source=str(source),
                max_length=self.max_length,
                max_rows=0,
                max_eval_rows=eval_rows,
                max_test_rows=test_rows,
                test_fraction=0,
            )
            prepare(settings, self.work / "outline", 0, self.work / name)

    def _model_settings(self, base: str) -> Any:
        from spectraqlora.settings import ModelSettings

        return ModelSettings.model_validate({"base_model": base, "compute_dtype": self.compute_dtype})

    def account(self) -> dict[str, Any]:
        """Rows by what they are for, and the share of the rows rendered that were too long to be used."""
        from spectraqlora.artifacts import PreparedRows

        tuning, study = PreparedRows.read(self.work / TUNING), PreparedRows.read(self.work / STUDY)
        too_long = sum(d.rows for d in study.account.dropped if "longer" in d.reason)
        return {
            "rates": tuning.train_rows + tuning.eval_rows,
            "train": study.train_rows,
            "held_out": study.eval_rows,
            "test": study.test_rows,
            "too_long": too_long,
            "too_long_share": round(too_long / (too_long + study.account.used), 3),
            "tokens": study.train_tokens,
        }

    def run(self, arm: Arm, rate: float, seed: int, part: str) -> dict[str, Any]:
        """Train one arm once; of the study's rows the test rows are scored, of the tuning's the held-out ones."""
        from spectraqlora.artifacts import RankMap
        from spectraqlora.models.adapters import with_adapter
        from spectraqlora.models.loading import load_four_bit
        from spectraqlora.scoring.held_out import score_test_rows
        from spectraqlora.settings import EvaluateSettings, TrainSettings
        from spectraqlora.steps.train.request import Inputs, TrainRequest
        from spectraqlora.steps.train.training import train

        quantized, start = self.work / "quantized", None
        with tempfile.TemporaryDirectory() as scratch:
            ranks, adapter = Path(scratch) / "ranks", Path()
            ranks.mkdir()
            rank_map = self._rank_map(arm, seed, part, ranks)
            if arm.initialiser:
                quantized, start = self._initialised(arm, rank_map, seed, part)
                RankMap.read(start).write(ranks)
            train_settings = TrainSettings(
                max_steps=self.steps * arm.lengths // arm.rounds,
                batch_size=self.batch_size,
                learning_rate=rate,
                evaluations=2 * arm.lengths // arm.rounds if part == STUDY else 1,
            )
            seconds = 0.0
            for turn in range(1, arm.rounds + 1):
                if turn > 1:
                    ranks, start = self._next_round(arm, turn - 1, seed, part, ranks, adapter)
                adapter = Path(scratch) / f"adapter-{turn}"
                request = TrainRequest(
                    Inputs(quantized, self.work / part, ranks, start),
                    adapter,
                    seed,
                    arm.rounds,
                    train=train_settings,
                    evaluate=EvaluateSettings(batch_size=_BATCH),
                )
                log = train(request)
                seconds += log.train_seconds
            test = (
                score_test_rows(with_adapter(load_four_bit(quantized)[0], adapter), self.work / part, _BATCH)
                if part == STUDY
                else None
            )
        row = {
            "arm": arm.name,
            "rate": rate,
            "seed": seed,
            "part": part,
            "held_out_loss": round(log.best_eval_loss, 5),
            "trained_parameters": log.trainable_parameters,
            "seconds": round(seconds, 1),
        }
        if test:
            row |= {"test_loss": round(test.loss, 5), "row_losses": [round(loss, 1) for loss in test.losses]}
        return row

    def _next_round(
        self, arm: Arm, turn: int, seed: int, part: str, ranks: Path, adapter: Path
    ) -> tuple[Path, Path]:
        """Re-evaluate a round: the rank map and the adapter that the following one starts from, beside its own."""
        from spectraqlora.settings import EvaluateSettings, SnrSettings
        from spectraqlora.steps.re_evaluate.evaluate import Inputs, Outputs, Sections, re_evaluate

        names = ("evaluation", "next-ranks", "next-adapter")
        outputs = Outputs(*(adapter.with_name(f"{name}-{turn}") for name in names))
        for folder in (outputs.evaluation, outputs.next_rank_map, outputs.next_adapter):
            folder.mkdir()
        settings = self._settings(arm)
        inputs = Inputs(
            self.work / "quantized",
            self.work / part,
            ranks,
            adapter,
            self.work / "table",
            self._measurement(settings, seed, part),
        )
        sections = Sections(EvaluateSettings(batch_size=_BATCH, accuracy_rows=0), settings, SnrSettings())
        re_evaluate(inputs, outputs, sections, turn, arm.rounds, seed)
        return outputs.next_rank_map, outputs.next_adapter

    def base_scores(self) -> dict[str, Any]:
        """The base's mean loss of the test rows, and the counted tokens of each."""
        from spectraqlora.models.loading import load_four_bit
        from spectraqlora.scoring.held_out import score_test_rows

        scored = score_test_rows(load_four_bit(self.work / "quantized")[0], self.work / STUDY, _BATCH)
        assert scored is not None
        return {"base_test_loss": round(scored.loss, 5), "row_tokens": scored.tokens}

    def _settings(self, arm: Arm) -> Any:
        from spectraqlora.settings import SelectSettings

        of_rank = {"rank": RANK, "rank_high": RANK, "rank_low": RANK // 2}
        return SelectSettings.model_validate(of_rank | dict(arm.select))

    def _rank_map(self, arm: Arm, seed: int, part: str, output: Path) -> Any:
        from spectraqlora.artifacts import FourBitModel
        from spectraqlora.steps.select_layers.select import Inputs, select

        settings = self._settings(arm)
        if arm.method == CONDITION_NUMBER:
            manifest = FourBitModel.read(self.work / "quantized")
            rank_map = condition_number_map(Path(self.base), manifest.modules, settings)
            rank_map = rank_map.model_copy(update={"base_digest": manifest.base_digest})
            rank_map.write(output)
            return rank_map
        inputs = Inputs(self.work / "outline", self.work / "table", self._measurement(settings, seed, part))
        return select(arm.method, inputs, settings, seed, output)

    def _measurement(self, settings: Any, seed: int, part: str) -> Path:
        """The base's gradient sketches of a seed, made once for all arms: they depend on no rank."""
        from tests.measured import write_measurement

        def make(folder: Path) -> None:
            write_measurement(self.work / "quantized", self.work / part, settings, seed, folder)

        return self._once(f"measurement-{part}-{seed}", make)

    def _initialised(self, arm: Arm, rank_map: Any, seed: int, part: str) -> tuple[Path, Path]:
        """The 4-bit base that belongs to an initialiser's A and B, and the folder of these, with their rank map."""
        from spectraqlora.steps.quantize_load.quantize import quantize

        from tests.benchmarks.evidence.initialisers import initialise

        def make(folder: Path) -> None:
            from spectraqlora.artifacts import FourBitModel

            for name in ("quantized", "outline", "start"):
                (folder / name).mkdir(parents=True)
            assert arm.initialiser is not None
            initialise(arm.initialiser, self.base, rank_map, self.work / part, seed, self.batch_size, folder)
            quantize(self._model_settings(str(folder / "base")), folder / "quantized", folder / "outline")
            digest = FourBitModel.read(folder / "quantized").base_digest
            rank_map.model_copy(update={"base_digest": digest}).write(folder / "start")

        folder = self._once(f"{arm.initialiser}-{part}-{seed}", make)
        return folder / "quantized", folder / "start"

    def _once(self, name: str, make: Any) -> Path:
        """A folder under `made`, complete or not there; `make` fills it."""
        folder = self.work / "made" / name
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch) / "own"
                make(made)
                made.rename(folder)
        return folder


def best_conditioned(model: Any, share: float) -> set[str]:
    """The share of a model's matrices whose condition number is lowest, as PEFT measures it."""
    from peft.helpers import find_kappa_target_modules

    return set(find_kappa_target_modules(model, top_p=share, show_progress=False)["target_modules"])


def condition_number_map(base: Path, modules: list[LinearModule], select: SelectSettings) -> RankMap:
    """LoRA of one rank on those of the modules that are among the half of the base's matrices that is best conditioned."""
    import torch
    from spectraqlora.methods.catalogue import method
    from spectraqlora.models.loading import load_plain

    chosen = best_conditioned(load_plain(base, torch.float32), 0.5)
    scores = {m.module: (1.0, 0.0) for m in modules if m.module in chosen}
    everything = select.model_copy(update={"percent": 100.0})
    return method("hybrid").first_ranks(modules, scores, everything, 0, {})
