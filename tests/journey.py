"""The way of a toy model through the steps' own functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from spectraqlora.artifacts import FourBitModel
from spectraqlora.models import adapters
from spectraqlora.models.four_bit import copy_dequantized
from spectraqlora.models.loading import load_four_bit, load_plain
from spectraqlora.planning.steps import plan_for
from spectraqlora.sample import world
from spectraqlora.settings import (
    DataSettings,
    ModelSettings,
    SelectSettings,
    SnrSettings,
    TrainSettings,
)
from spectraqlora.steps.prepare_data.prepare import prepare
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora.steps.select_layers.select import Inputs as Selection
from spectraqlora.steps.select_layers.select import select
from spectraqlora.steps.snr_analyze.analyze import Inputs as Measured
from spectraqlora.steps.snr_analyze.analyze import analyze
from spectraqlora.steps.train.request import Inputs, TrainRequest
from spectraqlora.steps.train.training import train

from tests.architectures import Builder, written
from tests.measured import write_measurement
from tests.small import small

SELECT = SelectSettings(rank=4, rank_high=4, rank_low=2, signal="spectrum")
TRAIN = TrainSettings(max_steps=1, evaluations=1, learning_rate=5e-2, warmup_ratio=0)


@dataclass(frozen=True)
class Journey:
    """What became of a model."""

    moved: float
    """How far training moved the logits, as a share of the largest."""
    gap: float
    """How far those of the merged model, loaded again by its own class, lie from those of 4-bit base and adapter."""


def journey(build: Builder, work: Path) -> Journey:
    """Take a toy model through outline, 4 bits, SNR, selection, a plan, a training step, merge and plain reload.

    Raises:
        InputError: the model is refused.
    """
    four_bit, outline, data, ranks, table, measurement, adapter = (
        work / name for name in ("four_bit", "outline", "data", "ranks", "table", "measurement", "adapter")
    )
    base = written(build, work / "base")
    manifest = quantize(ModelSettings(base_model=str(base)), four_bit, outline)
    plan_for(str(base), small(methods="qlora"), 0)
    for folder in (data, ranks):
        folder.mkdir()
    prepare(DataSettings(source=str(_rows(work))), outline, 1, data)
    analyze(Measured(outline), SnrSettings(), table)
    write_measurement(four_bit, data, SELECT, 1, measurement, methods=("qlora",))
    select("qlora", Selection(outline, table, measurement), SELECT, 1, ranks)
    train(TrainRequest(Inputs(four_bit, data, ranks), adapter, 1, train=TRAIN))

    model, _ = load_four_bit(four_bit)
    before, adapted = _logits(model), _logits(adapters.with_adapter(model, adapter).eval())
    merged = _merged(base, four_bit, manifest, adapter, work / "merged")
    scale = float(adapted.abs().max())
    return Journey(
        float((adapted - before).abs().max()) / scale,
        float((_logits(merged) - adapted).abs().max()) / scale,
    )


def _rows(work: Path) -> Path:
    path = work / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in world.questions(world.people(0, 12), 0)[:24]))
    return path


def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(9, 29)[None]
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, **more).logits
    return logits


def _merged(base: Path, four_bit: Path, manifest: FourBitModel, adapter: Path, folder: Path) -> Any:
    """The adapter merged into the dequantized weights, saved, and loaded by the class that its config names."""
    import transformers

    plain = load_plain(base, torch.float32)
    transposed = {info.module for info in manifest.modules if info.transposed}
    copy_dequantized(load_four_bit(four_bit)[0], plain, transposed)
    adapters.merge(plain, adapter).save_pretrained(folder)
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    loaded, info = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return loaded.eval()
