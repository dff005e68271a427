"""Fused experts in 4 bits: what they take, what they compute, and what becomes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from spectraqlora.models.experts import FourBitTensor, can_pack, hold, pack, packed_experts
from spectraqlora.models.four_bit import copy_dequantized, count_parameters, load_in_four_bit
from spectraqlora.models.loading import load_four_bit, load_plain, stored_bytes
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.planning.shape import ModelShape, config_of
from spectraqlora.settings import ModelSettings, SnrSettings
from spectraqlora.snr.table import read_table
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze

from tests.architectures import ARCHITECTURES, causal, written

SHAPE = (4, 96, 64)
WIDE = causal("Mixtral", num_local_experts=4, hidden_size=256, intermediate_size=512, num_hidden_layers=2)


def packed(shape: tuple[int, ...] = SHAPE, double: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    return pack(torch.randn(shape).to(dtype), "nf4", double, torch.float32)


def seen(parameter: Any) -> FourBitTensor:
    return FourBitTensor(parameter.data, parameter.quant_state)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_bitsandbytes(
    double: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several pieces, the last one smaller.
    monkeypatch.setattr("spectraqlora.models.experts._PACKED_AT_ONCE", 64 * 100)
    monkeypatch.setattr("spectraqlora.models.experts._UNPACKED_AT_ONCE", 64 * 100)
    torch.manual_seed(1)
    plain = torch.randn(SHAPE).to(dtype)
    ours = pack(plain, "nf4", double, torch.bfloat16)
    codes, state = functional.quantize_4bit(plain, compress_statistics=double, quant_type="nf4")
    assert torch.equal(ours.data.view(torch.uint8).view(-1), codes.view(-1))
    assert ours.quant_state == state
    assert torch.equal(seen(ours).dequantized(), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [SHAPE, (3, 10, 32)])
def test_a_product_with_a_view_is_that_of_the_numbers(shape: tuple[int, ...]) -> None:
    tensor = seen(packed(shape))
    numbers, x = tensor.dequantized(), torch.randn(5, shape[2])
    views: list[Callable[[Any], Any]] = [
        lambda w: w[1].T,
        lambda w: w[-1].T,
        lambda w: w.transpose(-2, -1)[2],
        lambda w: w.permute(1, 2, 0)[..., 1].T,
        lambda w: w.select(2, 3).new_zeros(shape[2], 2) + w[0, 0, 0],
    ]
    for view in views:
        assert torch.equal(x @ view(tensor), x @ view(numbers))
    ends = torch.tensor([2, 2, 5, 5][: shape[0]], dtype=torch.int32)
    grouped = torch.nn.functional.grouped_mm
    if shape == SHAPE:
        assert torch.equal(
            grouped(x, tensor.transpose(-2, -1), offs=ends), grouped(x, numbers.transpose(-2, -1), offs=ends)
        )


def test_autograd_keeps_codes_and_not_the_numbers_of_experts() -> None:
    tensor = seen(packed())
    x = torch.randn(6, 64, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = torch.nn.functional.linear(x, tensor[2]).square().sum()
    weights = [saved for saved in kept if sorted(saved.shape) == [64, 96]]
    assert weights
    assert all(isinstance(saved, FourBitTensor) for saved in weights)
    out.backward()
    expected = 2 * (x @ tensor[2].dequantized().T) @ tensor[2].dequantized()
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-4)


def test_experts_take_half_a_byte_a_number_and_their_scales(tmp_path: Path) -> None:
    base = written(WIDE, tmp_path / "base")
    manifest = quantize(ModelSettings(base_model=str(base)), tmp_path / "four_bit", tmp_path / "outline")
    model, _ = load_four_bit(tmp_path / "four_bit")
    numbers = sum(tensor.numel() for _, tensor in packed_experts(model))
    assert numbers == 2 * 4 * 3 * 256 * 512
    assert count_parameters(model)[1] == manifest.four_bit_parameters > numbers
    assert not [name for name in manifest.unquantized if "expert" in name]
    planned = ModelShape(config_of(str(base)), "float32")
    assert planned.four_bit == manifest.four_bit_parameters
    assert planned.dequantized == 4 * 2 * 256 * 512
    assert stored_bytes(model) == pytest.approx(planned.weight_bytes, rel=0.05)
    stored = _stored_bytes(tmp_path / "four_bit" / "model", "experts.")
    # Codes, a byte of scale for 64 of them, four for 256 scales; per tensor 2 kB of tables and settings.
    assert numbers * (1 / 2 + 1 / 64) <= stored <= numbers * (1 / 2 + 1 / 64 + 1 / 4096) + 4 * 2048


def _stored_bytes(folder: Path, part: str) -> int:
    return sum(
        tensor.nbytes
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if part in name
    )


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama-4"])
def test_packed_experts_compute_what_their_numbers_do_and_train(name: str, tmp_path: Path) -> None:
    """Of three layouts: merged from single experts, with biases and transposed, without grouped products."""
    base = written(ARCHITECTURES[name], tmp_path / "base")
    quantize(ModelSettings(base_model=str(base)), tmp_path / "four_bit", tmp_path / "outline")
    loaded, _ = load_four_bit(tmp_path / "four_bit")
    direct, plain = load_in_four_bit(base, torch.float32).eval(), load_plain(base, torch.float32).eval()
    assert list(packed_experts(loaded))
    copy_dequantized(loaded, plain, set())
    ids = torch.arange(9, 29)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (loaded, direct, plain)]
    assert torch.equal(logits[0], logits[1])
    assert torch.allclose(logits[0], logits[2], atol=1e-5)

    gradients = []
    for model in (loaded, plain):
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append(embedded.grad)
    assert bool(torch.isfinite(gradients[0]).all())
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_merging_leaves_experts_of_the_original_as_they_are(tmp_path: Path) -> None:
    """And of the quantized weights, what was trained with."""
    base = written(ARCHITECTURES["qwen3-moe"], tmp_path / "base")
    quantize(ModelSettings(base_model=str(base)), tmp_path / "four_bit", tmp_path / "outline")
    plain, quantized = load_plain(base, torch.float32), load_plain(base, torch.float32)
    four_bit, _ = load_four_bit(tmp_path / "four_bit")
    copy_dequantized(four_bit, quantized, set())
    plain.save_pretrained(tmp_path / "export")
    before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (base, tmp_path / "export"))
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 4 * 4 * 3
    assert all(torch.equal(before[name], after[name]) for name in experts)
    for name, tensor in packed_experts(four_bit):
        assert torch.equal(quantized.get_parameter(name), tensor.dequantized())
        assert not torch.equal(quantized.get_parameter(name), plain.get_parameter(name))


def test_a_packed_checkpoint_is_measured_expert_by_expert_and_may_be_a_base_itself(tmp_path: Path) -> None:
    base = written(ARCHITECTURES["mixtral"], tmp_path / "base")
    quantize(ModelSettings(base_model=str(base)), tmp_path / "four_bit", tmp_path / "outline")
    model, _ = load_four_bit(tmp_path / "four_bit")
    stored = LocalTensors(tmp_path / "four_bit" / "model")
    for name, tensor in packed_experts(model):
        name = name.replace(".mlp.", ".block_sparse_moe.")  # As Mixtral's checkpoints call it.
        assert stored.shape(name) == tensor.shape
        assert torch.equal(stored.load(name), tensor.dequantized())
        assert torch.equal(stored.load(name, 2), tensor[2].dequantized())
    analyze(
        Inputs(tmp_path / "outline", tmp_path / "four_bit"),
        SnrSettings(source="quantized"),
        tmp_path / "table",
    )
    table = read_table(tmp_path / "table")
    assert len(table[table["type"].str.contains("experts")]) == 4 * 4 * 2

    settings = ModelSettings(base_model=str(tmp_path / "four_bit" / "model"))
    quantize(settings, tmp_path / "again", tmp_path / "outline-again")
    again, _ = load_four_bit(tmp_path / "again")
    ids = torch.arange(9, 29)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(list(packed_experts(again))) == len(list(packed_experts(model)))


def test_a_module_of_packed_experts_is_still_of_its_class_and_may_be_copied() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = packed(), packed((4, 64, 96))
            self.bias = torch.nn.Parameter(torch.zeros(4, 96))

    module: Any = Experts()
    for name in ("up", "down"):
        hold(module, name, module._parameters[name].quant_state)
    assert isinstance(module, Experts)
    assert type(module).__name__ == "Experts"
    assert module.up.shape == SHAPE
    assert module.down.shape == (4, 64, 96)
    assert [name for name, _ in module.named_parameters()] == ["up", "down", "bias"]
    assert {"up", "up.absmax", "down.nested_absmax", "bias"} <= set(module.state_dict())
    again = copy.deepcopy(module)
    assert torch.equal(again.up.dequantized(), module.up.dequantized())


@pytest.mark.parametrize(
    ("name", "shape", "packs"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 128, 64), True),
        ("model.layers.0.block_sparse_moe.input_linear", (8, 128, 64), True),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (8, 128), False),
        ("model.layers.0.mamba.conv1d.weight", (128, 1, 64), False),
        ("model.layers.0.mlp.experts.down_proj", (3, 5, 7), False),
    ],
)
def test_which_tensors_are_experts_that_are_packed(name: str, shape: tuple[int, ...], packs: bool) -> None:
    assert can_pack(name, torch.Size(shape)) is packs


def test_experts_that_fill_no_blocks_stay_plain_and_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = causal("Mixtral", num_local_experts=3, hidden_size=24, intermediate_size=28, num_key_value_heads=4)
    base = written(odd, tmp_path / "base")
    manifest = quantize(ModelSettings(base_model=str(base)), tmp_path / "four_bit", tmp_path / "outline")
    assert any(name.endswith("experts.down_proj") for name in manifest.unquantized)
    said = capsys.readouterr().out
    assert "6 expert matrices in fused tensors are 4-bit and frozen" in said
    assert "6 expert matrices in fused tensors stay in float32 and frozen" in said
    model, _ = load_four_bit(tmp_path / "four_bit")
    assert {name.rpartition(".")[2] for name, _ in packed_experts(model)} == {"gate_up_proj"}
