"""The look at base models of many architectures, each with random weights: what is good is never refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spectraqlora.models.inspection import inspect_folder, open_tensors
from spectraqlora.places import base_place

from tests.families import FAMILIES, UNFORESEEN

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def causal(name: str, **changes: Any) -> Callable[[int], Any]:
    def build(vocabulary: int) -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**SIZES, "vocab_size": vocabulary, **changes})
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


def conditional(name: str, **changes: Any) -> Callable[[int], Any]:
    """A language model that also sees; `text` changes its text part."""

    def build(vocabulary: int) -> Any:
        import transformers

        text = {**SIZES, "vocab_size": vocabulary, **changes.get("text", {})}
        rest = {key: value for key, value in changes.items() if key != "text"}
        config = getattr(transformers, f"{name}Config")(text_config=text, **rest)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return build


ARCHITECTURES: dict[str, Callable[[int], Any]] = {
    "qwen2": causal("Qwen2"),
    "qwen2-moe": causal("Qwen2Moe", **MIXTURE, shared_expert_intermediate_size=64),
    "qwen3-next": causal(
        "Qwen3Next", **MIXTURE, head_dim=16, shared_expert_intermediate_size=32, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gemma": causal("Gemma", head_dim=16),
    "stablelm": causal("StableLm"),
    "olmo2": causal("Olmo2"),
    "olmo3": causal("Olmo3"),
    "olmoe": causal("Olmoe", num_experts=4, num_experts_per_tok=2),
    "granite": causal("Granite"),
    "granite-4": causal(
        "GraniteMoeHybrid", **MAMBA, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64,
        layer_types=["mamba", "attention"],
    ),
    "cohere2": causal("Cohere2"),
    "deepseek-v2": causal("DeepseekV2", **LATENT),
    "glm-4": causal("Glm4", head_dim=16),
    "smollm3": causal("SmolLM3"),
    "exaone-4": causal("Exaone4", layer_types=["full_attention"] * 2, sliding_window=None),
    "nemotron": causal("Nemotron"),
    "starcoder2": causal("Starcoder2"),
    "phi": causal("Phi"),
    "jamba": causal(
        "Jamba", num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False,
    ),
    "falcon-h1": causal("FalconH1", **{**MAMBA, "mamba_n_heads": 4}, mamba_d_ssm=64, head_dim=16),
    "gemma-3-that-sees": conditional(
        "Gemma3", text={"head_dim": 16, "query_pre_attn_scalar": 16}, vision_config=VISION, mm_tokens_per_image=4,
        image_token_index=5, boi_token_index=6, eoi_token_index=7,
    ),
    "llava": conditional(
        "Llava", text={"model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=5,
    ),
    "mistral-3": conditional(
        "Mistral3", text={"model_type": "mistral", "head_dim": 16},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 16}, image_token_index=5,
    ),
    "qwen2-vl": conditional(
        "Qwen2VL", text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
    ),
}  # fmt: skip


def written(build: Callable[[int], Any], folder: Path) -> Path:
    from spectraqlora.sample import make, world

    tokenizer = make._tokenizer(world.corpus(world.people(0, 12), 0, 300))
    torch.manual_seed(0)
    build(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*FAMILIES, *UNFORESEEN, *ARCHITECTURES])
def test_a_good_model_is_taken_and_each_module_knows_its_tensor(name: str, tmp_path: Path) -> None:
    folder = written((FAMILIES | UNFORESEEN | ARCHITECTURES)[name], tmp_path)
    inspection = inspect_folder(folder)
    tensors = open_tensors(base_place(str(folder)))
    assert inspection.dtype == "float32"
    for info in inspection.modules:
        shape = tensors.shape(info.tensor)
        wanted = (info.out_features, info.in_features)
        assert shape == (wanted[::-1] if info.transposed else wanted), info.module
    assert not any("vis" in info.module for info in inspection.modules), "the language model's alone"
