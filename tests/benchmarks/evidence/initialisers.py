"""A and B by PEFT's own initialisers, for a 4-bit base.

PEFT makes PiSSA's and LoRA-GA's only of weights that are not quantized: they take B·A out of the weight, and what is left
has to be quantized anew (PEFT raises TypeError and ValueError where it is 4-bit already). So each is made on the
original weights, and the base without B·A goes to `base`, to be quantized as any. EVA leaves the base as it is; its
redistribution of ranks is off (rho 1), so that all arms train equally many parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.benchmarks.evidence.arms import Initialiser

if TYPE_CHECKING:
    from spectraqlora.artifacts import RankMap

_BATCHES = 8
"""Of calibration rows, as `select.calibration_batches`."""


def initialise(
    name: Initialiser, base: str, rank_map: RankMap, rows: Path, seed: int, batch_size: int, folder: Path
) -> None:
    """Write the base that is left to `folder/base` and PEFT's adapter to `folder/start`.

    Args:
        name: of the initialiser.
        base: folder of the model, not quantized.
        rank_map: which matrices get an adapter of which rank.
        rows: prepared rows.
        seed: of the order of rows, and of what is drawn.
        batch_size: rows of a calibration batch.
        folder: what is written to.
    """
    from peft import EvaConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.loraga import preprocess_loraga
    from spectraqlora.models.adapters import lora_config, save
    from spectraqlora.models.loading import load_plain, load_tokenizer

    torch.manual_seed(seed)
    model = load_plain(Path(base), torch.float32)
    config = lora_config(rank_map)
    config.init_lora_weights = name
    if name == "eva":
        config.eva_config = EvaConfig(rho=1.0)
    if name == "lora_ga":
        config.lora_ga_config = LoraGAConfig()

        def learn() -> None:
            for batch in _batches(model, rows, seed, batch_size):
                model(**batch).loss.backward()

        preprocess_loraga(model, config, learn)
    wrapped = get_peft_model(model, config)
    if name == "eva":
        batches = _batches(wrapped, rows, seed, batch_size)
        initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    save(wrapped, folder / "start", base)
    wrapped.unload().save_pretrained(folder / "base")
    load_tokenizer(Path(base), False).save_pretrained(folder / "base")


def _batches(model: Any, rows: Path, seed: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The rows that training begins with, in batches."""
    from spectraqlora.scoring.batches import Collator, load_rows, order

    train = load_rows(rows, "train")
    places = order(len(train), seed, 0, _BATCHES * batch_size)
    collate = Collator.of(model.config)
    return [
        collate([train[place] for place in places[start : start + batch_size]])
        for start in range(0, len(places), batch_size)
    ]
