"""Adapters carried over to other ranks; the spectrum of an update by hand."""

import pytest
import torch
from spectraqlora.methods.carry_over import UpdateSpectrum, carry_over, update_spectrum
from spectraqlora.methods.catalogue import moving
from spectraqlora.settings import SelectSettings

from tests.modules import first_ranks, modules

MODULES = modules(10, up=(32, 16))
SCORES = {m.module: (10.0 - m.layer, 0.0) for m in MODULES}
FULL = {m.module: UpdateSpectrum(4, 4.0, 0.1) for m in MODULES}


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_carried_adapters_keep_their_function_when_ranks_grow(variant: str) -> None:
    settings = SelectSettings(rank=4, rank_high=4, rank_low=2, variant=variant)
    # A budget that pays for every growth.
    before = first_ranks("alors", MODULES, SCORES, settings).model_copy(update={"budget": 10**6})
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for entry in before.active():
        weights[f"{entry.module}.lora_A"] = torch.randn(entry.rank, 16, generator=generator)
        weights[f"{entry.module}.lora_B"] = torch.randn(32, entry.rank, generator=generator)
    after = moving("alors").next_ranks(before, MODULES, SCORES, FULL, settings)
    carried, errors = carry_over(weights, before, after, 0)
    assert not errors and after.modules != before.modules
    for old, new in zip(before.active(), after.active(), strict=True):
        product = [
            ranks.scaling(entry) * pairs[f"{entry.module}.lora_B"] @ pairs[f"{entry.module}.lora_A"]
            for ranks, entry, pairs in ((before, old, weights), (after, new, carried))
        ]
        torch.testing.assert_close(product[0], product[1])


def test_the_spectrum_of_an_update_by_hand() -> None:
    # B·A = diag(3, 1): squares 9 and 1, so one direction holds 90 % and two hold all.
    a, b = torch.eye(2, 5), torch.diag(torch.tensor([3.0, 1.0]))
    spectrum = update_spectrum(a, b, 2.0, 10.0, 0.9)
    assert (spectrum.energy_rank, spectrum.relative_norm) == (1, pytest.approx(2 * 10**0.5 / 10))
    assert update_spectrum(a, b, 2.0, 10.0, 0.95).energy_rank == 2
    assert spectrum.effective_rank == pytest.approx(1.7548, abs=1e-4)
    assert update_spectrum(a, b * 0, 2.0, 10.0, 0.95).energy_rank == 0
