"""Packed weights: every format's layout, written here as its own writer packs it, comes out as the matrix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from spectraqlora.artifacts import FourBitModel
from spectraqlora.errors import InputError
from spectraqlora.models.inspection import inspect_folder, open_tensors
from spectraqlora.models.loading import load_four_bit, load_plain, original_folder
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.places import base_place
from spectraqlora.settings import ModelSettings
from spectraqlora.snr.scan import scan
from spectraqlora.steps.quantize_load.quantize import quantize

from tests.models import change_header, change_json, copied

Q = "model.layers.0.self_attn.q_proj.weight"
Written = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]
"""The quantization config, the stored tensors by what follows the module's name, and the weight that they stand for."""


def fp8_blocks(weight: torch.Tensor) -> Written:
    """DeepSeek's: a scale for each block of 32 x 48, the last ones cut; W = q · scale."""
    high, wide = 32, 48
    rows, cols = weight.shape
    scale = torch.empty(-(-rows // high), -(-cols // wide))
    codes, exact = torch.empty(rows, cols, dtype=torch.float8_e4m3fn), torch.empty(rows, cols)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            scale[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
            exact[block] = codes[block].float() * scale[i, j]
    config = {"quant_method": "fp8", "weight_block_size": [high, wide], "fmt": "e4m3"}
    return config, {"weight": codes, "weight_scale_inv": scale}, exact


def fp8_tensor(weight: torch.Tensor) -> Written:
    """compressed-tensors' float-quantized with one scale."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {}},
    }
    return config, {"weight": codes, "weight_scale": scale.reshape(1)}, codes.float() * scale


def fp8_rows(weight: torch.Tensor) -> Written:
    """FBGEMM's and compressed-tensors' channel scales."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"quant_method": "fbgemm_fp8"}, {"weight": codes, "weight_scale": scale}, codes.float() * scale


def int8(weight: torch.Tensor) -> Written:
    """bitsandbytes' LLM.int8: SCB is each row's largest absolute value."""
    scale = weight.abs().amax(1)
    codes = (weight / scale[:, None] * 127).round().to(torch.int8)
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return config, {"weight": codes, "SCB": scale}, codes.float() * scale[:, None] / 127


def grouped(
    weight: torch.Tensor, bits: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (in x out), zeros and scales (groups x out), and what they stand for (out x in)."""
    grid = weight.T.reshape(-1, size, weight.shape[0])
    low, high = grid.amin(1), grid.amax(1)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    codes = (grid / scales[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1)
    exact = ((codes - zeros[:, None]) * scales[:, None]).reshape(weight.shape[1], -1).T
    return codes.reshape(weight.shape[1], -1).long(), zeros.long(), scales, exact


def words(codes: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """AutoGPTQ's and AutoAWQ's loops: so many codes in an int32, code `order[i]` at the i-th lowest place."""
    each = 32 // bits
    order = order or tuple(range(each))
    codes = codes if axis == 1 else codes.T
    packed = torch.zeros(codes.shape[0], codes.shape[1] // each, dtype=torch.int64)
    for col in range(packed.shape[1]):
        for place, which in enumerate(order):
            packed[:, col] |= codes[:, col * each + which] << (bits * place)
    packed = packed.where(packed < 2**31, packed - 2**32).to(torch.int32)
    return (packed if axis == 1 else packed.T).contiguous()


def gptq(weight: torch.Tensor, bits: int = 4) -> Written:
    codes, zeros, scales, exact = grouped(weight, bits, 16)
    stored = {
        "qweight": words(codes, bits, 0),
        "qzeros": words(zeros - 1, bits, 1),
        "scales": scales.half(),
        "g_idx": (torch.arange(weight.shape[1]) // 16).to(torch.int32),
    }
    return {"quant_method": "gptq", "bits": bits, "group_size": 16}, stored, exact


def gptq8(weight: torch.Tensor) -> Written:
    return gptq(weight, 8)


def gptq_reordered(weight: torch.Tensor) -> Written:
    """desc_act: inputs are of groups that are not next to each other; g_idx says which."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    config, stored, exact = gptq(weight[:, order])
    back = torch.argsort(order)
    codes = torch.stack([(stored["qweight"] >> (4 * i)) & 15 for i in range(8)], 1).reshape(
        weight.shape[1], -1
    )[back]
    stored["qweight"], stored["g_idx"] = words(codes.long(), 4, 0), stored["g_idx"][back]
    return config, stored, exact[:, back]


def awq(weight: torch.Tensor) -> Written:
    codes, zeros, scales, exact = grouped(weight, 4, 16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "qweight": words(codes, 4, 1, order),
        "qzeros": words(zeros, 4, 1, order),
        "scales": scales.half(),
    }
    return {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, stored, exact


def int8_with_zeros(weight: torch.Tensor) -> Written:
    """compressed-tensors' int-quantized, asymmetric: W = (q - zero) · scale, both of each row."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    codes = (weight / scale + zero).round().clamp(-128, 127)
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    stored = {
        "weight": codes.to(torch.int8),
        "weight_scale": scale,
        "weight_zero_point": zero.to(torch.int8),
    }
    return config, stored, (codes - zero) * scale


def pack_quantized(weight: torch.Tensor, bits: int = 4) -> Written:
    """compressed-tensors' pack-quantized, asymmetric, in groups of 16: codes and zeros plus half their range."""
    codes, zeros, scales, exact = grouped(weight, bits, 16)
    stored = {
        "weight_packed": words(codes.T.contiguous(), bits, 1),
        "weight_scale": scales.T,
        "weight_zero_point": words(zeros.T.contiguous(), bits, 0),
        "weight_shape": torch.tensor(weight.shape),
    }
    return {"quant_method": "compressed-tensors", "format": "pack-quantized"}, stored, exact


def pack_quantized8(weight: torch.Tensor) -> Written:
    return pack_quantized(weight, 8)


FORMATS = [
    fp8_blocks, fp8_tensor, fp8_rows, int8, int8_with_zeros, gptq, gptq8, gptq_reordered, awq, pack_quantized,
    pack_quantized8,
]  # fmt: skip


def packed_copy(
    model: Path, folder: Path, write: Callable[[torch.Tensor], Written]
) -> dict[str, torch.Tensor]:
    """The model with all its projections packed; returns all its weights as they come out."""
    copied(model, folder)
    stored: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = exact[name] = weight
            continue
        config, parts, exact[name] = write(weight.float())
        stored |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    change_json(folder / "config.json", lambda document: document.update(quantization_config=config))
    return exact


@pytest.mark.parametrize("write", FORMATS)
def test_a_packed_model_is_the_model_that_it_stands_for(
    write: Callable[[torch.Tensor], Written], tiny_model: Path, tmp_path: Path
) -> None:
    exact = packed_copy(tiny_model, tmp_path / "model", write)
    tensors = LocalTensors(tmp_path / "model")
    assert set(tensors.names()) == set(exact)
    for name, weight in exact.items():
        assert tensors.shape(name) == tuple(weight.shape)
        torch.testing.assert_close(tensors.load(name).float(), weight.float(), rtol=1e-5, atol=1e-6)
    assert "28 matrices are packed" in inspect_folder(tmp_path / "model").lines[0]
    plain = copied(tiny_model, tmp_path / "plain")
    save_file(
        {name: w.contiguous() for name, w in exact.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    wanted, measured = scan(LocalTensors(plain)), scan(open_tensors(base_place(str(tmp_path / "model"))))
    columns = ["module", "type", "rows", "cols"]
    keyed = measured.set_index("module").loc[wanted["module"]].reset_index()
    pd.testing.assert_frame_equal(keyed[columns], wanted[columns])
    pd.testing.assert_series_equal(keyed["snr"], wanted["snr"], rtol=1e-3)


def test_a_packed_base_goes_through_quantize_and_loads_plainly(tiny_model: Path, tmp_path: Path) -> None:
    exact = packed_copy(tiny_model, tmp_path / "model", fp8_blocks)
    manifest = quantize(
        ModelSettings(base_model=str(tmp_path / "model")), tmp_path / "four_bit", tmp_path / "outline"
    )
    assert manifest.dtype == "float32", "what its config says"
    assert all(m.four_bit for m in manifest.modules) and len(manifest.modules) == 28
    plain = load_plain(original_folder(manifest), torch.float32)
    weight = plain.get_parameter(Q)
    torch.testing.assert_close(weight, exact[Q], rtol=2**-8, atol=0)
    assert load_four_bit(tmp_path / "four_bit")[0].get_input_embeddings().weight.shape[1] == 64


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False)])
def test_a_model_in_four_bits_is_taken_as_it_is_with_its_own_quantization(
    kind: str, double: bool, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = copied(tiny_model, tmp_path / "model")
    own = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=own, device_map={"": "cpu"}
    ).save_pretrained(folder)
    before = LocalTensors(folder)
    assert scan(open_tensors(base_place(str(folder))))["module"].nunique() == 28
    manifest = quantize(ModelSettings(base_model=str(folder)), tmp_path / "four_bit", tmp_path / "outline")
    assert (manifest.quant_type, manifest.double_quant) == (kind, double)
    after = LocalTensors(tmp_path / "four_bit" / "model")
    assert set(before.packings) == set(after.packings) and len(before.packings) == 28
    assert torch.equal(before.load(Q).float(), after.load(Q).float()), "not quantized a second time"
    model, read = load_four_bit(tmp_path / "four_bit")
    assert (
        isinstance(read, FourBitModel)
        and model.model.layers[0].self_attn.q_proj.compute_dtype == torch.float32
    )


def gpt_oss_blocks(experts: int, out: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, out, groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(118, 126, (experts, out, groups), generator=generator, dtype=torch.uint8)


def test_mxfp4_comes_out_as_transformers_unpacks_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = gpt_oss_blocks(3, 8, 2)
    stem = "model.layers.0.mlp.experts.down_proj"
    save_file({f"{stem}_blocks": blocks, f"{stem}_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    tensors = LocalTensors(tmp_path)
    assert tensors.names() == [stem] and tensors.shape(stem) == (3, 64, 8)
    assert torch.equal(tensors.load(stem), convert_moe_packed_tensors(blocks, scales))
    assert list(scan(tensors)["module"]) == [f"{stem}[{index}]" for index in range(3)]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "aqlm"}, "quant_method one of"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ codes of 2, 4 or 8 bits; it says 3"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemm"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "it is 'marlin-24'"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "it is 'nvfp4-pack-quantized'",
        ),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "nothing says how to read them"),
        ({"quant_method": 5}, "quant_method one of"),
        ({}, "nothing says how to read them"),
    ],
)
def test_codes_that_cannot_be_read_are_never_measured(
    config: dict[str, Any], words: str, tiny_model: Path, tmp_path: Path
) -> None:
    packed_copy(tiny_model, tmp_path / "model", gptq)
    change_json(
        tmp_path / "model" / "config.json", lambda document: document.update(quantization_config=config)
    )
    for action in (inspect_folder, lambda folder: open_tensors(base_place(str(folder)))):
        with pytest.raises(InputError, match=words):
            action(tmp_path / "model")


PACKED_BY_COMPRESSED_TENSORS: dict[int, tuple[list[list[int]], list[list[int]]]] = {
    4: (
        [[1049950800], [-1239649576]] * 5,
        [[1518778741, 1805081222], [151, 168]],
    ),
    8: (
        [
            [252314880, 589175060], [926035240, 1262895420], [1599755600, 1936615780], [-2021491336, -1684631156],
            [-1347770976, -1010910796], [-674050616, -337190436], [-330256, 319686916], [656547096, 993407276],
            [1330267456, 1667127636], [2003987816, -1954119300],
        ],
        [[-2088665219, 2105704574], [2105704574, 2122547583], [33151, 33408]],
    ),
}  # fmt: skip
"""What the package compressed-tensors, 0.20.0, made of the 10 x 8 matrix below: `weight_packed`, `weight_zero_point`."""


@pytest.mark.parametrize("bits", PACKED_BY_COMPRESSED_TENSORS)
def test_what_compressed_tensors_packed_comes_out(bits: int, tmp_path: Path) -> None:
    codes = torch.arange(80).reshape(10, 8) * 5 % 2**bits - 2 ** (bits - 1)
    zeros, scale = torch.arange(20).reshape(10, 2) % 7 - 3, 0.25 * (1 + torch.arange(20.0).reshape(10, 2) % 3)
    wanted = (codes - zeros.repeat_interleave(4, 1)) * scale.repeat_interleave(4, 1)
    packed, zero = (torch.tensor(part, dtype=torch.int32) for part in PACKED_BY_COMPRESSED_TENSORS[bits])
    parts = {
        "packed": packed, "zero_point": zero, "scale": scale, "shape": torch.tensor([10, 8])
    }  # fmt: skip
    save_file(
        {f"layers.0.up.weight_{name}": part for name, part in parts.items()}, tmp_path / "model.safetensors"
    )
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    tensors = LocalTensors(tmp_path)
    assert tensors.names() == ["layers.0.up.weight"] and tensors.shape("layers.0.up.weight") == (10, 8)
    assert torch.equal(tensors.load("layers.0.up.weight"), wanted)


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_plain_weights_under_a_config_that_calls_them_packed_are_refused(
    method: str, tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    folder = copied(tiny_model, tmp_path / "model")
    change_json(folder / "config.json", lambda document: document.update(quantization_config=settings))
    with pytest.raises(
        InputError, match=r"config\.json.*weights that are packed, as its quantization_config"
    ):
        inspect_folder(folder)


@pytest.mark.parametrize("write", FORMATS)
def test_parts_that_do_not_fit_are_refused_by_name(
    write: Callable[[torch.Tensor], Written], tiny_model: Path, tmp_path: Path
) -> None:
    packed_copy(tiny_model, tmp_path / "model", write)
    stem = Q.removesuffix("weight")

    def rename(header: dict[str, Any]) -> None:
        kinds = ("scales", "SCB", "weight_scale_inv", "weight_scale")
        part = next(name for kind in kinds if (name := stem + kind) in header)
        header[f"{part}_gone"] = header.pop(part)

    change_header(tmp_path / "model" / "model.safetensors", rename)
    with pytest.raises(InputError, match=stem.replace(".", r"\.")):
        inspect_folder(tmp_path / "model")


@pytest.mark.parametrize(
    "change", [{"shape": [128, 128]}, {"blocksize": 32}, {"blocksize": 7}, {"shape": [-64, -64]}]
)
def test_a_four_bit_state_that_promises_more_than_there_is_is_refused_and_nothing_is_read_past_it(
    change: dict[str, Any], quantized: Path, tmp_path: Path
) -> None:
    folder = copied(quantized / "model", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    state = f"{Q}.quant_state.bitsandbytes__nf4"
    document = json.loads(bytes(tensors[state].tolist())) | change
    tensors[state] = torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=Q.replace(".", r"\.")):
        LocalTensors(folder)
