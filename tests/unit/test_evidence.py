"""The study of methods: its rows are apart, its controls are what they are called, and its tables are their raw results."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spectraqlora.artifacts import FourBitModel, RankMap
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_plain
from spectraqlora.scoring.batches import load_rows
from spectraqlora.settings import SelectSettings

from tests.benchmarks.evidence import tables
from tests.benchmarks.evidence.arms import CURVES, HYBRID, QLORA, SGM, TABLES, Initialiser, arms
from tests.benchmarks.evidence.initialisers import initialise
from tests.benchmarks.evidence.runs import HIGHEST_RATE, LEARNING_RATES, best_rates
from tests.benchmarks.evidence.study import Study, condition_number_map, parts
from tests.modules import first_ranks

PAGE = Path(__file__).parents[1] / "benchmarks" / "README.md"


@pytest.mark.parametrize("tested", [[], ["t1\n", "t2\n"]])
@pytest.mark.parametrize("count", [30, 31, 101])
def test_rows_that_choose_a_rate_train_or_are_reported_are_apart(count: int, tested: list[str]) -> None:
    lines = [f"{i}\n" for i in range(count)]
    split = parts(lines, tested)
    (tuning,), (train, test) = split["tuning"].values(), split["study"].values()
    assert [*tuning, *train, *([] if tested else test)] == lines
    assert test == (tested or lines[-math.ceil(count / 10) :])


def test_a_rate_is_searched_beyond_an_end_that_is_the_best() -> None:
    optimum = {"inside": 0.009, "below": 0.0011, "above": 0.03, "nowhere": 1.0}
    asked: list[tuple[str, float]] = []

    def losses(tries: list[tuple[str, float]]) -> list[float]:
        asked.extend(tries)
        return [abs(math.log(rate / optimum[name])) for name, rate in tries]

    assert best_rates(optimum, losses) == {
        "inside": 0.008,
        "below": 0.001,
        "above": 0.032,
        "nowhere": HIGHEST_RATE,
    }
    assert {rate for name, rate in asked if name == "inside"} == set(LEARNING_RATES)
    # The best rate has a worse one on either side.
    assert {rate for name, rate in asked if name == "below"} == {*LEARNING_RATES, 0.002, 0.001, 0.0005}


def test_every_arm_takes_its_rate_from_one_of_its_tables() -> None:
    for name in TABLES:
        members = arms([name])
        assert {arm.tuned_as for arm in members.values()} <= set(arms(list(TABLES)))
        assert TABLES[name].reference in members
    assert {name for curve in CURVES.values() for name in (arm.name for arm in curve)} == set(arms(["curve"]))


def test_the_condition_number_control_takes_the_half_whose_condition_number_is_lowest(
    quantized: Path, tiny_model: Path
) -> None:
    modules = FourBitModel.read(quantized).modules
    plain = load_plain(tiny_model, torch.float32)
    numbers = {}
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear):
            values = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)
            numbers[name] = values[0] / values[-1]
    lowest = sorted(numbers, key=lambda name: numbers[name])[: len(numbers) // 2]
    rank_map = condition_number_map(tiny_model, modules, SelectSettings(rank=4))
    assert {m.module for m in rank_map.active()} == {m.module for m in modules} & set(lowest)
    assert 0 < len(rank_map.active()) < len(modules)
    assert {m.rank for m in rank_map.active()} == {4}


@pytest.mark.parametrize("name", ["pissa", "lora_ga", "eva"])
def test_an_initialiser_leaves_the_function_as_it_was_and_the_parameters_as_many(
    name: Initialiser, quantized: Path, tiny_model: Path, prepared: Path, tmp_path: Path
) -> None:
    members = FourBitModel.read(quantized).modules
    rank_map: RankMap = first_ranks("qlora", members, {}, SelectSettings(rank=4))
    initialise(name, str(tiny_model), rank_map, prepared, 1, 4, tmp_path)
    ids = torch.arange(24)[None] % 50
    with torch.no_grad():
        expected = load_plain(tiny_model, torch.float32)(input_ids=ids).logits
        base = load_plain(tmp_path / "base", torch.float32)
        without = base(input_ids=ids).logits
        weights = adapters.read_adapter_weights(tmp_path / "start")
        together = adapters.attach(base, rank_map, start=weights)(input_ids=ids).logits
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-4)
    # PiSSA and LoRA-GA move a part of the weight into the adapter; EVA's B is zero.
    assert torch.allclose(without, expected, atol=1e-4) == (name == "eva")
    assert {key: tuple(weight.shape) for key, weight in weights.items()} == {
        f"{m.module}.{factor}": shape
        for m in members
        for factor, shape in (("lora_A", (4, m.in_features)), ("lora_B", (m.out_features, 4)))
    }


def test_a_study_reports_test_rows_that_nothing_was_chosen_by(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    study = Study(str(tiny_model), tmp_path, 1, 2, 128, "float32")
    study.prepare(tiny_rows, None, 4, 100)
    rows = {
        (part, split): {tuple(row["input_ids"]) for row in load_rows(tmp_path / part, split)}
        for part, splits in (("tuning", ("train", "held_out")), ("study", ("train", "held_out", "test")))
        for split in splits
    }
    for one, other in itertools.combinations(rows, 2):
        assert not rows[one] & rows[other], (one, other)
    account, base = study.account(), study.base_scores()
    assert len(base["row_tokens"]) == account["test"] == len(rows["study", "test"]) > 0
    by_name = arms(["arms"])
    for name in ("condition number-50", "qlora, PiSSA"):
        run = study.run(by_name[name], 0.004, 1, "study")
        assert sum(run["row_losses"]) / sum(base["row_tokens"]) == pytest.approx(run["test_loss"], abs=0.05)
        # One step moves it a little, from the base or from what PiSSA's residual in 4 bits and its adapter are.
        assert run["test_loss"] == pytest.approx(base["base_test_loss"], rel=0.1)
        assert run["trained_parameters"] > 0
    rounds = [study.run(arm, 0.004, 1, "study") for arm in TABLES["rounds"].arms[:2]]
    assert rounds[0]["trained_parameters"] >= rounds[1]["trained_parameters"] > 0
    assert rounds[0]["test_loss"] != rounds[1]["test_loss"]
    tuned = study.run(by_name[QLORA], 0.004, 0, "tuning")
    assert "test_loss" not in tuned and tuned["held_out_loss"] > 0


TOKENS = [3, 5, 2, 10]


def _results(tmp_path: Path, arms_: dict[str, dict[int, list[float]]], trained: dict[str, int]) -> Any:
    """Raw results with these row losses by arm and seed, as a file."""
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "rate": 0.008,
            "held_out_loss": 1.0,
            "trained_parameters": trained.get(arm, 1000),
            "test_loss": round(sum(losses) / sum(TOKENS), 5),
            "row_losses": losses,
        }
        for arm, seeds in arms_.items()
        for seed, losses in seeds.items()
    ]
    rows = {"train": 9, "held_out": 2, "test": 4, "rates": 6, "too_long_share": 0.25}
    about = {"task": "sums", "model": "m", "steps": 3, "batch_size": 2, "max_length": 64, "rows": rows}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**about, "row_tokens": TOKENS, "base_test_loss": 4.0, "runs": runs}))
    return tables.Results.read(str(path))


def test_differences_are_paired_by_seed_and_by_row(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    own, other = generator.uniform(1, 9, (2, 3, 4)).round(1)
    results = _results(
        tmp_path,
        {
            HYBRID: {seed: own[seed].tolist() for seed in range(3)},
            # A seed that only one of them has is left out.
            QLORA: {seed: other[seed].tolist() for seed in range(2)},
        },
        {},
    )
    gap = tables.paired(results, HYBRID, QLORA)
    tokens = np.array(TOKENS)
    seeds = own[:2].sum(axis=1) / tokens.sum() - other[:2].sum(axis=1) / tokens.sum()
    assert gap is not None and gap.mean == pytest.approx(seeds.mean(), abs=2e-5)
    assert gap.across_seeds == pytest.approx(seeds.std(ddof=1) / np.sqrt(2), abs=2e-5)
    # The standard error of a ratio of sums over rows.
    rows = (own[:2] - other[:2]).mean(axis=0)
    residual = rows - rows.sum() / tokens.sum() * tokens
    assert gap.by_row == pytest.approx(np.sqrt((residual**2).sum() * 4 / 3) / tokens.sum())
    shown = tables.table(TABLES["arms"], [results])
    assert f"| {QLORA} | 1,000 |" in shown and str(gap) in shown and "25% longer than 64 tokens" in shown


def test_one_seed_has_no_spread_over_seeds(tmp_path: Path) -> None:
    results = _results(tmp_path, {HYBRID: {1: [1.0, 2, 3, 4]}, QLORA: {1: [2.0, 2, 3, 4]}}, {})
    assert str(tables.paired(results, HYBRID, QLORA)).startswith("-0.0500 (rows ± ")
    assert (
        tables.paired(_results(tmp_path, {HYBRID: {1: [1.0] * 4}, QLORA: {2: [1.0] * 4}}, {}), HYBRID, QLORA)
        is None
    )


def test_what_a_method_trains_at_the_loss_of_another_is_read_off_its_curve(tmp_path: Path) -> None:
    # 20 tokens: losses 3, 2 and 1 at 100, 400 and 1,600 parameters.
    curve = [arm.name for arm in CURVES[SGM]][:3]
    losses = {name: {1: [20.0 * loss, 0, 0, 0]} for name, loss in zip(curve, (3, 2, 1), strict=True)}
    trained = dict(zip(curve, (100, 400, 1600), strict=True))
    rank_8 = CURVES[HYBRID][0].name
    results = _results(tmp_path, losses | {rank_8: {1: [50.0, 0, 0, 0]}}, trained | {rank_8: 250})
    assert tables.parameters_at(results, curve, 2.5) == pytest.approx(200)
    assert tables.parameters_at(results, curve, 1.5) == pytest.approx(800)
    assert tables.parameters_at(results, curve, 3.5) is None
    line = tables.at_equal_loss(results).splitlines()[-1]
    assert line == f"| sums | {rank_8} | 2.5000 | 250 | beyond its curve | 200 (-20%) |"


def test_the_pages_tables_are_what_their_commands_print() -> None:
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^ {4}python -m tests\.benchmarks\.evidence\.tables ", page, re.MULTILINE)
    assert len(commands) == page.count("<!-- end of the table -->")
    assert tables.renewed(page) == page, (
        "python -m tests.benchmarks.evidence.tables page tests/benchmarks/README.md"
    )


def test_a_page_gets_its_tables_and_keeps_the_rest(tmp_path: Path) -> None:
    _results(tmp_path, {HYBRID: {1: [1.0, 2, 3, 4]}, QLORA: {1: [2.0, 2, 3, 4]}}, {})
    command = f"    python -m tests.benchmarks.evidence.tables arms {tmp_path / 'results.json'}"
    page = f"above\n\n{command}\n\nstale\n<!-- end of the table -->\n\nbelow\n"
    written = tables.renewed(page)
    assert written.startswith(f"above\n\n{command}\n\n| arm |") and written.endswith(
        "\n<!-- end of the table -->\n\nbelow\n"
    )
    assert "stale" not in written and f"| {QLORA} | 1,000 | 0.5500 |" in written
    assert tables.renewed(written) == written
