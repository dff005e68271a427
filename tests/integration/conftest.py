"""A server and a winner that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mlflow_server import MlflowServer
from tests.unit.results import evaluation


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A tracking server with two workers, so that requests really meet in the database."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), workers=2) as server:
        yield server


@pytest.fixture(scope="session")
def exported(quantized: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A winner: an adapter that is not zero, and the base with it merged in."""
    import torch
    from peft import PeftModel
    from spectraqlora.artifacts import FourBitModel, MergedModel
    from spectraqlora.methods.catalogue import method
    from spectraqlora.models import adapters
    from spectraqlora.models.loading import load_plain
    from spectraqlora.settings import SelectSettings
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("winner")
    manifest = FourBitModel.read(quantized)
    ranks = method("qlora").first_ranks(manifest.modules, {}, SelectSettings(rank=4), 1, {})
    ranks = ranks.model_copy(update={"base_digest": manifest.base_digest})
    torch.manual_seed(0)
    wrapped = adapters.attach(load_plain(tiny_model, torch.float32), ranks)
    for layer in adapters.lora_layers(wrapped).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    adapters.save(wrapped, folder / "adapter", str(tiny_model))
    model = PeftModel.from_pretrained(load_plain(tiny_model, torch.float32), folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "merged")
    MergedModel(
        method="qlora", base_digest=manifest.base_digest, merged_into="original", adapter_eval_loss=1.0,
        eval_loss_quantized=1.0, eval_loss_original=1.0, verified_eval_loss=1.0,
    ).write(folder)  # fmt: skip
    evaluation("qlora", [1.0, 2.0], 100).model_copy(
        update={"rounds": [evaluation("qlora", [1.0], 1).rounds[0].model_copy(update={"rank_map": ranks})]}
    ).write(folder)
    return folder
