"""What moves between rounds, and why; the spectrum of an update by hand."""

import pytest
import torch
from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.methods.next_round import carry_over, next_rank_map
from spectraqlora.methods.ranks import cost, rank_map
from spectraqlora.methods.updates import UpdateSpectrum, update_spectrum
from spectraqlora.settings import SelectSettings
from spectraqlora.steps.re_evaluate.evaluate import keep_earned

MODULES = [
    LinearModule(
        module=f"model.layers.{layer}.mlp.up_proj",
        type="mlp.up_proj",
        layer=layer,
        out_features=32,
        in_features=16,
        four_bit=True,
    )
    for layer in range(10)
]
SCORES = {m.module: (10.0 - m.layer, 0.0) for m in MODULES}
SETTINGS = SelectSettings(rank=4, rank_high=4, rank_low=2)
FULL = {m.module: UpdateSpectrum(4, 4.0, 0.1) for m in MODULES}


def _map(method: str, settings: SelectSettings = SETTINGS) -> RankMap:
    return rank_map(method, MODULES, SCORES, settings, "b", 1)


def _ranks(ranks: RankMap) -> list[int]:
    return [m.rank for m in ranks.modules]


def test_hybrid_lets_modules_in_and_freezes_those_that_leave() -> None:
    before = _map("hybrid")
    assert [m.tier for m in before.modules] == ["selected"] * 5 + ["frozen-base"] * 5
    scores = SCORES | {MODULES[9].module: (100.0, 0.0)}
    after = next_rank_map(before, MODULES, scores, {}, SETTINGS)
    assert [m.tier for m in after.modules][4] == "frozen" and after.modules[4].rank == 4
    assert after.modules[9].tier == "selected" and after.modules[9].rank == 4
    assert after.changes == [
        f"{MODULES[4].module}: leaves the top set by SNR, its adapter stays frozen",
        f"{MODULES[9].module}: enters the top set by SNR",
    ]
    assert next_rank_map(before, MODULES, SCORES, {}, SETTINGS).changes == ["nothing moved"]


def test_alors_doubles_full_ranks_takes_back_idle_ones_and_keeps_the_rest() -> None:
    before = _map("alors")
    assert _ranks(before) == [4, 4, 4, 2, 2, 2, 2, 0, 0, 0]
    spectra = {m.module: UpdateSpectrum(3, 3.0, 0.1) for m in MODULES[:3]}
    spectra |= {m.module: UpdateSpectrum(2, 2.0, 0.1) for m in MODULES[3:7]}
    spectra[MODULES[0].module] = UpdateSpectrum(1, 1.0, 0.1)
    after = next_rank_map(before, MODULES, SCORES, spectra, SETTINGS)
    assert _ranks(after) == [1, 4, 4, 4, 4, 4, 4, 0, 0, 0]
    assert after.changes[0].endswith("its update lives in 1 directions, rank 4 to 1")
    assert after.changes[1].endswith("its update uses all 2 directions, rank 2 to 4")


def test_alors_follows_the_snr_of_the_updated_weights_first() -> None:
    before = _map("alors")
    scores = SCORES | {MODULES[9].module: (100.0, 0.0), MODULES[0].module: (0.0, 0.0)}
    after = next_rank_map(before, MODULES, scores, FULL, SETTINGS)
    tiers = [m.tier for m in after.modules]
    assert (tiers[9], after.modules[9].rank) == ("high", 4)
    assert (tiers[0], after.modules[0].rank) == ("frozen", 4)
    assert f"{MODULES[9].module}: SNR moves it from low to high" in after.changes
    assert f"{MODULES[0].module}: SNR moves it from high to low, its adapter stays frozen" in after.changes
    trained = [m for m in after.active() if m.tier != "frozen"]
    mean = sum(m.rank * m.lr_scale for m in trained) / sum(m.rank for m in trained)
    assert mean == pytest.approx(1)


def test_alors_never_doubles_beyond_its_ceiling_or_the_matrix() -> None:
    settings = SelectSettings(rank=4, rank_high=16, rank_low=2)
    after = next_rank_map(_map("alors", settings), MODULES, SCORES, {}, settings)
    assert after.modules[0].rank == 16
    full = {m.module: UpdateSpectrum(16, 16.0, 0.1) for m in MODULES}
    assert next_rank_map(after, MODULES, SCORES, full, settings).modules[0].rank == 16


def test_alors_moves_stay_within_the_budget() -> None:
    settings = SETTINGS.model_copy(update={"budget": 0.5})
    budget = 0.5 * 4 * sum(map(cost, MODULES))
    before = _map("alors", settings)
    after = next_rank_map(before, MODULES, SCORES, FULL, settings)
    for ranks in (before, after):
        spent = sum(m.rank * cost(info) for m, info in zip(ranks.modules, MODULES, strict=True))
        assert 0.8 * budget <= spent <= budget


def test_modules_keep_the_task_score_they_were_chosen_for() -> None:
    before = _map("hybrid")
    used_up = {name: (score / 100, 0.0) for name, (score, _) in SCORES.items()}
    kept = keep_earned(used_up, before)
    assert next_rank_map(before, MODULES, kept, {}, SETTINGS).changes == ["nothing moved"]


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_carried_adapters_keep_their_function_when_ranks_grow(variant: str) -> None:
    settings = SelectSettings(rank=4, rank_high=4, rank_low=2, variant=variant)
    before = _map("alors", settings)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for entry in before.active():
        weights[f"{entry.module}.lora_A"] = torch.randn(entry.rank, 16, generator=generator)
        weights[f"{entry.module}.lora_B"] = torch.randn(32, entry.rank, generator=generator)
    after = next_rank_map(before, MODULES, SCORES, FULL, settings)
    carried, errors = carry_over(weights, before, after, 0)
    assert not errors and _ranks(after) != _ranks(before)
    for old, new in zip(before.active(), after.active(), strict=True):
        product = [
            ranks.scaling(entry) * pairs[f"{entry.module}.lora_B"] @ pairs[f"{entry.module}.lora_A"]
            for ranks, entry, pairs in ((before, old, weights), (after, new, carried))
        ]
        torch.testing.assert_close(product[0], product[1])


def test_the_spectrum_of_an_update_by_hand() -> None:
    # B·A = diag(3, 1): squares 9 and 1, so one direction holds 90 % and two hold all.
    a, b = torch.eye(2, 5), torch.diag(torch.tensor([3.0, 1.0]))
    found = update_spectrum(a, b, 2.0, 10.0, 0.9)
    assert (found.energy_rank, found.relative_norm) == (1, pytest.approx(2 * 10**0.5 / 10))
    assert update_spectrum(a, b, 2.0, 10.0, 0.95).energy_rank == 2
    assert found.effective_rank == pytest.approx(1.7548, abs=1e-4)
    assert update_spectrum(a, b * 0, 2.0, 10.0, 0.95).energy_rank == 0
