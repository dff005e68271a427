"""A method that only this test knows goes through the steps once it is in the catalogue."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from spectraqlora.artifacts import Evaluation, LinearModule, RankMap, TrainingLog
from spectraqlora.methods.carry_over import UpdateSpectrum
from spectraqlora.methods.catalogue import METHODS, check_methods
from spectraqlora.methods.ranks import check_rank, equal_ranks, first_map, next_map
from spectraqlora.models.adapters import read_adapter_weights
from spectraqlora.runtime import command_line
from spectraqlora.settings import SelectSettings, parse
from spectraqlora.signals.gradients import GradientSketch
from spectraqlora.signals.scores import Scores
from spectraqlora.steps.compare.leaderboard import winning_method

from tests.unit.results import evaluation


class EveryOther:
    """Adapters on every other layer; in the next round on the layers between, with half of the rank."""

    name = "every_other"
    summary = "LoRA on every other layer, and in the next round on those between"
    control = True
    moves = True
    recomputes = True
    colour = "#123456"

    def measures_gradients(self, select: SelectSettings) -> bool:
        return True

    def check(self, modules: list[LinearModule], select: SelectSettings) -> None:
        check_rank(modules, select, "rank")

    def first_ranks(
        self,
        modules: list[LinearModule],
        scores: Scores,
        select: SelectSettings,
        seed: int,
        sketches: Mapping[str, GradientSketch],
    ) -> RankMap:
        assert sketches.keys() == {m.module for m in modules} == scores.keys()
        chosen = dict.fromkeys((m.module for m in modules if m.layer % 2 == 0), "even")
        return first_map(self.name, modules, chosen, equal_ranks(modules, chosen, select), scores, select)

    def next_ranks(
        self,
        current: RankMap,
        modules: list[LinearModule],
        scores: Scores,
        updates: Mapping[str, UpdateSpectrum],
        select: SelectSettings,
    ) -> RankMap:
        assert updates.keys() == {m.module for m in current.active()}
        odd = {"tier": "odd", "rank": select.rank // 2, "alpha": 1.0}
        ranks = [m.model_copy(update={"tier": "frozen"} if m.rank else odd) for m in current.modules]
        return next_map(current, ranks, ["odd layers: their turn"])


@pytest.fixture
def every_other(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(METHODS, EveryOther.name, EveryOther())
    return EveryOther.name


def test_it_goes_through_selection_training_and_re_evaluation(
    every_other: str, quantized: Path, outline: Path, prepared: Path, tmp_path: Path
) -> None:
    folders = {"four-bit": quantized, "outline": outline, "rows": prepared}
    settings = {
        "select-settings": {"rank": 4, "calibration_batches": 2, "sketch_size": 16},
        "train-settings": {"max_steps": 2, "batch_size": 4, "evaluations": 1},
        "evaluate-settings": {"accuracy_rows": 0},
        "tracking-settings": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
    }

    def run(step: str, *more: str, **outputs: str) -> None:
        """Run a step with the folders and settings that it asks for."""
        known = {
            option.name.replace("_", "-") for option in command_line.options(command_line.component(step))
        }
        folders.update({name.replace("_", "-"): tmp_path / folder for name, folder in outputs.items()})
        for name in known & folders.keys() - {"previous"}:
            more = (*more, f"--{name}", str(folders[name]))
        for name in known & settings.keys():
            more = (*more, f"--{name}", json.dumps(settings[name]))
        command_line.run(step, list(more))

    run("snr-analyze", table="table")
    run("measure-base", "--methods", every_other, measurement="measurement")
    run("select-layers", "--method", every_other, rank_map="rank_map")
    selected = RankMap.read(tmp_path / "rank_map")
    assert {m.layer % 2 for m in selected.active()} == {0} and selected.base_digest
    assert (tmp_path / "rank_map" / "a_init.safetensors").exists()

    run("train", "--round", "1", "--rounds", "2", adapter="adapter")
    assert TrainingLog.read(tmp_path / "adapter").loss_curve[-1][0] == 2, "the first of two rounds"

    outputs = {"evaluation": "evaluation", "next_rank_map": "next_rank_map", "next_adapter": "next_adapter"}
    run("re-evaluate", "--round", "1", "--rounds", "2", **outputs)
    evaluated, following = Evaluation.read(tmp_path / "evaluation"), RankMap.read(tmp_path / "next_rank_map")
    assert evaluated.method == every_other and evaluated.eval_loss < evaluated.base_eval_loss
    assert evaluated.rounds[0].changes == ["odd layers: their turn"]
    assert [m.rank for m in following.modules] == [2 if m.layer % 2 else 4 for m in following.modules]
    carried = read_adapter_weights(tmp_path / "next_adapter")
    assert {len(carried[f"{m.module}.lora_A"]) for m in following.modules if m.layer % 2} == {2}


def test_settings_the_comparison_and_the_report_know_it(every_other: str) -> None:
    from spectraqlora.report.plots import cost_bars

    assert check_methods(parse({"methods": f"qlora,{every_other}"})).methods == ("qlora", every_other)
    better, worse = evaluation(every_other, [1.0, 2.0], 10), evaluation("qlora", [2.0, 3.0], 20)
    assert winning_method([better, worse]) == "qlora", "it says that it is a control"
    assert EveryOther.colour in cost_bars([better, worse])
