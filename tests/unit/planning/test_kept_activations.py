"""Activations counted without storage, against those that real models keep."""

from pathlib import Path
from typing import Any

import pytest
import torch
from spectraqlora.models import adapters
from spectraqlora.models.activations import recomputed
from spectraqlora.models.loading import load_four_bit
from spectraqlora.planning.activations import kept_activations
from spectraqlora.planning.shape import ModelShape, config_of
from spectraqlora.planning.training import surrogate_map
from spectraqlora.settings import ModelSettings
from spectraqlora.steps.quantize_load.quantize import quantize
from transformers import AutoConfig

from tests.families import write_family
from tests.small import small

ROWS, TOKENS = 4, 64


def really_kept(model: Any, padded: bool) -> int:
    """Bytes that a real forward pass keeps, without the weights."""
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and not recomputed(tensor):
            seen[storage._cdata] = storage
        return tensor

    ids = torch.randint(3, 50, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, TOKENS - 5 :] = int(not padded)
    model.get_output_embeddings().forward = lambda hidden: hidden
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
    del outputs
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "gpt2"])
def test_activations_counted_without_storage_are_those_of_the_real_4_bit_model(
    family: str, dtype: str, tmp_path: Path
) -> None:
    write_family(family, tmp_path / "base")
    (tmp_path / "quantized").mkdir()
    manifest = quantize(
        ModelSettings(base_model=str(tmp_path / "base"), compute_dtype=dtype),
        tmp_path / "quantized",
        tmp_path / "outline",
    )
    shape = ModelShape(AutoConfig.from_pretrained(tmp_path / "base"), dtype)
    assert (shape.parameters, shape.four_bit) == (manifest.parameters, manifest.four_bit_parameters)
    ranks = surrogate_map("hybrid", shape, small())
    for padded in (False, True):
        planned = kept_activations(adapters.attach(shape.build(), ranks), ROWS, TOKENS, padded, cuda=False)
        model, _ = load_four_bit(tmp_path / "quantized")
        real = really_kept(adapters.attach(model, ranks).train(), padded)
        assert sum(planned.blocks) + planned.outside == pytest.approx(real, rel=0.01)


def test_every_block_keeps_the_same_and_checkpointing_one_input_of_each() -> None:
    shape = ModelShape(config_of("7B"), "bfloat16")
    ranks = surrogate_map("qlora", shape, small())
    model = adapters.attach(shape.build(), ranks)
    kept = kept_activations(model, 1, 128, padded=False, cuda=True)
    assert len(kept.blocks) == 32
    # The embeddings below the first block need no gradient.
    assert len(set(kept.blocks[1:])) == 1 and kept.blocks[0] < kept.blocks[1]
    assert kept.inputs == (128 * 4096 * 2,) * 32
    saved = sum(kept.blocks[0:32:3]) - sum(kept.inputs[0:32:3])
    assert kept.with_recomputation(3) == (kept.outside + sum(kept.blocks) - saved, kept.again[3])
    assert kept.with_recomputation(0) == (kept.outside + sum(kept.blocks), 0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_stretch_with_the_positions_keep_what_fixed_ones_do(kind: str) -> None:
    config = config_of("7B")
    config.num_hidden_layers = 2
    kept = []
    for given in ({"rope_type": "default"}, {"rope_type": kind, "factor": 2.0}):
        if kind in given.values():
            given |= {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
            given |= {"original_max_position_embeddings": 1024}
        config.rope_parameters = {"rope_theta": 10_000.0, **given}
        shape = ModelShape(config, "bfloat16")
        kept.append(kept_activations(shape.build(), 1, 128, padded=False, cuda=True))
    assert kept[0] == kept[1]
