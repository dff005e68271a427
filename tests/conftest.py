"""A tiny Llama and data set that every test may use; nothing is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Toy models gain nothing from threads, and lose much to them where other work shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers, width 64, with a tokenizer, as a folder of safetensors."""
    import torch
    from spectraqlora.sample import make, world
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    people = world.people(0, 12)
    tokenizer = make._tokenizer(world.corpus(people, 0, 300))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():  # Weights are saved for their owner alone; steps in containers are others.
        path.chmod(0o644)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 questions and answers as JSON lines."""
    from spectraqlora.sample import world

    path = tmp_path_factory.mktemp("rows") / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in world.questions(world.people(0, 12), 0)))
    return path


@pytest.fixture(scope="session")
def quantized(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 4 bits."""
    from spectraqlora.settings import ModelSettings
    from spectraqlora.steps.quantize_load.quantize import quantize

    folder = tmp_path_factory.mktemp("model")
    quantize(ModelSettings(base_model=str(tiny_model)), folder / "four_bit", folder / "outline")
    return folder / "four_bit"


@pytest.fixture(scope="session")
def outline(quantized: Path) -> Path:
    """The tiny model without its weights."""
    return quantized.parent / "outline"


@pytest.fixture(scope="session")
def prepared(outline: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows tokenized and split."""
    from spectraqlora.settings import DataSettings
    from spectraqlora.steps.prepare_data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared")
    prepare(DataSettings(source=str(tiny_rows)), outline, 1, folder)
    return folder
