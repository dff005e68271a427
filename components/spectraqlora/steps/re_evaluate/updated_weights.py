"""The weights that training updated: their SNR, and what the updates are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from spectraqlora.artifacts import FourBitModel, LinearModule, RankMap
from spectraqlora.methods.carry_over import UpdateSpectrum, update_spectrum
from spectraqlora.models import adapters
from spectraqlora.models.loading import original_tensors
from spectraqlora.models.modules import dequantized_weight
from spectraqlora.settings import SnrSettings
from spectraqlora.snr.scan import scan_tensors, tensors_of
from spectraqlora.snr.table import with_rows

if TYPE_CHECKING:
    import pandas as pd


def update_spectra(
    model: Any, rank_map: RankMap, weights: dict[str, torch.Tensor], energy: float
) -> dict[str, UpdateSpectrum]:
    """Spectrum of every adapter's update, against the 4-bit weight under it.

    Args:
        model: PEFT model on the 4-bit base.
        rank_map: its rank map.
        weights: its adapters' weights.
        energy: share of an update's energy that its rank must hold.
    """
    layers = _base_layers(model)
    return {
        entry.module: update_spectrum(
            weights[f"{entry.module}.lora_A"],
            weights[f"{entry.module}.lora_B"],
            rank_map.scaling(entry),
            float(dequantized_weight(layers[entry.module]).norm()),
            energy,
        )
        for entry in rank_map.active()
    }


def updated_table(
    before: pd.DataFrame,
    model: Any,
    manifest: FourBitModel,
    rank_map: RankMap,
    weights: dict[str, torch.Tensor],
    snr: SnrSettings,
) -> pd.DataFrame:
    """The SNR table of the updated weights; matrices without an adapter keep their rows of `before`.

    Args:
        before: the table before training.
        model: PEFT model on the 4-bit base.
        manifest: of the 4-bit base; it names the original checkpoint.
        rank_map: says which modules have an adapter.
        weights: the adapters' weights.
        snr: which weights snr-analyze measured, the original ones or the 4-bit ones.
    """
    entries = {entry.module: entry for entry in rank_map.active()}
    adapted = [info for info in manifest.modules if info.module in entries]
    updated = (
        (name, adapters.merged_weight(entries[name], rank_map, weights, weight))
        for name, weight in _base_weights(model, manifest, adapted, snr)
    )
    return with_rows(before, scan_tensors(updated, snr.source, snr.ties))


def _base_weights(
    model: Any, manifest: FourBitModel, modules: list[LinearModule], snr: SnrSettings
) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, weight out x in) from the source that snr-analyze used."""
    if snr.source == "original":
        yield from tensors_of(original_tensors(manifest), modules)
        return
    layers = _base_layers(model)
    for info in modules:
        yield info.module, dequantized_weight(layers[info.module]).cpu()


def _base_layers(model: Any) -> dict[str, Any]:
    """The layers of a PEFT model by their names in the base, those under an adapter unwrapped."""
    return {
        name: getattr(layer, "base_layer", layer) for name, layer in model.base_model.model.named_modules()
    }
