"""Toy models of every supported family, random weights, made without any download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, INNER, LAYERS = 64, 128, 4


SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama_like(name: str, config_name: str = "", **extra: Any) -> Callable[[int], Any]:
    def build(vocabulary: int) -> Any:
        import transformers

        sizes = SIZES | {"num_hidden_layers": LAYERS}
        config = getattr(transformers, config_name or f"{name}Config")(
            vocab_size=vocabulary, **(sizes | extra)
        )
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


def _gpt2(vocabulary: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _named(name: str, **sizes: Any) -> Callable[[int], Any]:
    """A model whose config calls things by other names; `sizes` are all of it but the vocabulary."""

    def build(vocabulary: int) -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
        )
        kinds = ("ForConditionalGeneration",) if config.is_encoder_decoder else ("ForCausalLM", "ForMaskedLM")
        model = next(found for kind in kinds if (found := getattr(transformers, name + kind, None)))
        return model(config)

    return build


FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral", sliding_window=64),
    "qwen3": _llama_like("Qwen3", head_dim=16, tie_word_embeddings=True),
    "gemma3": _llama_like("Gemma3", "Gemma3TextConfig", head_dim=16, query_pre_attn_scalar=16),
    "gemma2": _llama_like("Gemma2", head_dim=16, query_pre_attn_scalar=16),
    "gpt2": _gpt2,
    "opt": _named(
        "OPT",
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "falcon": _named(
        "Falcon",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_kv_heads=1,
        multi_query=True,
        bias=False,
        parallel_attn=True,
        alibi=False,
    ),
    "t5": _named(
        "T5", d_model=WIDTH, d_kv=16, d_ff=INNER, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0
    ),
    "qwen3-moe": _llama_like(
        "Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}


UNFORESEEN: dict[str, Callable[[int], Any]] = {
    "bloom": _named("Bloom", hidden_size=WIDTH, n_layer=LAYERS, n_head=4),
    "gpt-neox": _llama_like("GPTNeoX"),
    "phi3": _llama_like("Phi3"),
    "cohere": _llama_like("Cohere"),
    "gpt-j": _named("GPTJ", n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128, rotary_dim=8),
    "mpt": _named("Mpt", d_model=WIDTH, n_layers=LAYERS, n_heads=4, max_seq_len=128),
    "bart": _named(
        "Bart",
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=128,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
    "mixtral": _llama_like("Mixtral", num_local_experts=4),
    "gpt-oss": _llama_like(
        "GptOss",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * LAYERS,
    ),
    "deepseek-v3": _llama_like(
        "DeepseekV3",
        num_key_value_heads=4,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}
"""Families that nothing in the code knows of."""

REFUSED: dict[str, Callable[[int], Any]] = {
    "bert": _named(
        "Bert", hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4
    ),
}


def _two_layers(name: str, **extra: Any) -> Callable[[int], Any]:
    return _llama_like(name, num_hidden_layers=2, **extra)


_EXPERTS = {"num_experts_per_tok": 2}
PACKED: dict[str, Callable[[int], Any]] = {
    "apertus": _two_layers("Apertus"),
    "arcee": _two_layers("Arcee"),
    "codegen": _named("CodeGen", n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128, rotary_dim=8),
    "cohere": _two_layers("Cohere"),
    "cohere2": _two_layers("Cohere2"),
    "deepseek_v3": UNFORESEEN["deepseek-v3"],
    "ernie4_5": _two_layers("Ernie4_5"),
    "exaone4": _two_layers("Exaone4"),
    "gemma": _two_layers("Gemma"),
    "gemma2": FAMILIES["gemma2"],
    "gemma3_text": FAMILIES["gemma3"],
    "glm": _two_layers("Glm"),
    "glm4": _two_layers("Glm4"),
    "glm4_moe": _two_layers(
        "Glm4Moe",
        n_routed_experts=4,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        head_dim=16,
        **_EXPERTS,
    ),
    "gpt2": _gpt2,
    "gpt_bigcode": _named("GPTBigCode", n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128),
    "gpt_neo": _named(
        "GPTNeo",
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
    ),
    "gpt_neox": _two_layers("GPTNeoX"),
    "gptj": UNFORESEEN["gpt-j"],
    "granite": _two_layers("Granite"),
    "granitemoe": _two_layers("GraniteMoe", num_local_experts=4, **_EXPERTS),
    "llama": _two_layers("Llama"),
    "mistral": _two_layers("Mistral", sliding_window=16),
    "mixtral": UNFORESEEN["mixtral"],
    "nemotron": _two_layers("Nemotron"),
    "olmo": _two_layers("Olmo"),
    "olmo2": _two_layers("Olmo2"),
    "olmo3": _two_layers("Olmo3", sliding_window=16),
    "olmoe": _two_layers("Olmoe", num_experts=4, **_EXPERTS),
    "phi": _two_layers("Phi"),
    "phi3": _two_layers("Phi3"),
    "qwen2": _two_layers("Qwen2"),
    "qwen2_moe": _two_layers(
        "Qwen2Moe",
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        **_EXPERTS,
    ),
    "qwen3": FAMILIES["qwen3"],
    "qwen3_moe": FAMILIES["qwen3-moe"],
    "seed_oss": _two_layers("SeedOss"),
    "smollm3": _two_layers("SmolLM3"),
    "stablelm": _two_layers("StableLm"),
    "starcoder2": _two_layers("Starcoder2"),
}
"""A model of each type whose rows may share sequences."""
MIXING: dict[str, Callable[[int], Any]] = {
    **{name: FAMILIES[name] for name in ("opt", "falcon")},
    **{name: UNFORESEEN[name] for name in ("bloom", "mpt", "gpt-oss")},
}
"""Families in which rows that share a sequence see each other."""


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def write_own_code(folder: Path) -> Path:
    """A toy Llama in `folder` under a name that only the Python file beside its weights knows."""
    write_family("llama", folder)
    (folder / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_family(name: str, folder: Path) -> Path:
    """A toy model of a family with a tokenizer in `folder`, as safetensors."""
    import torch
    from spectraqlora.sample import make, world

    tokenizer = make._tokenizer(world.corpus(world.people(0, 12), 0, 300))
    torch.manual_seed(0)
    model = (FAMILIES | UNFORESEEN | REFUSED)[name](len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
