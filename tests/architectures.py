"""Architectures of transformers at toy size: two to four layers, random weights, made from their configs.

`python -m tests.architectures` writes their table in models/README.md, as `make docs` does; tests compare it.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from spectraqlora.errors import InputError
from spectraqlora.models.inspection import Inspection, inspect_folder
from spectraqlora.models.modules import language_part, module_identity
from spectraqlora.settings import ModelSettings
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora_pipelines.reference import table

from tests import families
from tests.families import FAMILIES, PACKED, REFUSED, UNFORESEEN, _named

SIZES = families.SIZES | {"num_hidden_layers": 2}
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

CHUNKED = {
    "head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 4, "interleave_moe_layer_step": 2,
    "attention_chunk_size": 64,
}  # fmt: skip
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
LATER_VISION = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
    "fullatt_block_indexes": [1],
}  # fmt: skip
MARKS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}

Builder = Callable[[int], Any]
"""Makes a model of so many tokens."""


def causal(name: str, config: str = "", **changes: Any) -> Builder:
    """A language model; `config` is its config's class where it is named after something else."""

    def build(vocabulary: int) -> Any:
        import transformers

        sizes = {**SIZES, "vocab_size": vocabulary, **changes}
        return getattr(transformers, f"{name}ForCausalLM")(
            getattr(transformers, config or f"{name}Config")(**sizes)
        )

    return build


def conditional(name: str, **changes: Any) -> Builder:
    """A language model that also sees; `text` changes its text part."""

    def build(vocabulary: int) -> Any:
        import transformers

        text = {**SIZES, "vocab_size": vocabulary, **changes.get("text", {})}
        rest = {key: value for key, value in changes.items() if key != "text"}
        config = getattr(transformers, f"{name}Config")(text_config=text, **rest)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return build


_MORE: dict[str, Builder] = {
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
        expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8,
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
        "Qwen2VL", text=ROTARY, **MARKS,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
    ),
    "llama-4": causal("Llama4", "Llama4TextConfig", **CHUNKED),
    "llama-4-that-sees": conditional(
        "Llama4", text=CHUNKED, image_token_index=5, boi_token_index=6, eoi_token_index=7,
        vision_config={**VISION, "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64},
    ),
    "gemma-3n": causal(
        "Gemma3n", "Gemma3nTextConfig", head_dim=16, vocab_size_per_layer_input=500, hidden_size_per_layer_input=16,
        laurel_rank=8, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.5, 0.0],
    ),
    "phi-4-mini": causal(
        "Phi3", partial_rotary_factor=0.75, tie_word_embeddings=True, original_max_position_embeddings=128
    ),
    "mamba": _named("Mamba", hidden_size=64, num_hidden_layers=2, state_size=8, expand=2),
    "mamba-2": _named(
        "Mamba2", hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16, n_groups=1, expand=2
    ),
    "flan-t5": _named(
        "T5", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ),
    "pegasus": _named(
        "Pegasus", d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=128, decoder_start_token_id=0,
    ),
    "qwen2.5-vl": conditional("Qwen2_5_VL", text=ROTARY, vision_config=LATER_VISION, **MARKS),
    "qwen3-vl": conditional(
        "Qwen3VL", text={**ROTARY, "head_dim": 16}, **MARKS,
        vision_config={**LATER_VISION, "deepstack_visual_indexes": [1], "num_position_embeddings": 16},
    ),
    **{
        name: PACKED[name]
        for name in ("granitemoe", "glm4_moe", "seed_oss", "apertus", "ernie4_5", "gpt_bigcode", "gpt_neo", "codegen")
    },
}  # fmt: skip
ARCHITECTURES: dict[str, Builder] = {**FAMILIES, **UNFORESEEN, **_MORE}
"""Those that are trained."""
CANNOT: dict[str, Builder] = {"bert": REFUSED["bert"]}
"""Those that are refused."""


def written(build: Builder, folder: Path) -> Path:
    """A toy model with a tokenizer in a folder."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    build(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _tokenizer() -> Any:
    from spectraqlora.sample import make, world

    return make._tokenizer(world.corpus(world.people(0, 12), 0, 300))


README = Path(__file__).parents[1] / "components/spectraqlora/models/README.md"
_PART = re.compile(r"(<!-- architectures -->\n).*(\n<!-- end of architectures -->)", re.DOTALL)
Row = tuple[str, str, str]
"""A model's class, the layers that get an adapter, and what stays frozen without one; or the refusal."""


def row(build: Builder, inspection: Inspection) -> Row:
    """The table's row of a model that is taken."""
    with torch.device("meta"):
        model = build(64)
    language = language_part(model)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(language) and module_identity(name)
    }
    without = _kinds(linear - {info.module for info in inspection.modules})
    if any(p.ndim == 3 and re.search("expert|_moe", name) for name, p in model.named_parameters()):
        without.insert(0, "experts")
    adapted = _kinds({info.module for info in inspection.modules})
    return type(model).__name__, ", ".join(adapted), ", ".join(without)


def _kinds(names: set[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def refusal(build: Builder, work: Path) -> Row:
    """The table's row of a model that is refused."""
    base = written(build, work / "base")
    try:
        quantize(ModelSettings(base_model=str(base)), work / "four_bit", work / "outline")
    except InputError as error:
        with torch.device("meta"):
            return type(build(64)).__name__, "none", "refused: " + str(error).rpartition(": expected ")[2]
    raise AssertionError("the model is taken")


@functools.cache
def rows_in_readme() -> dict[str, Row]:
    """The table as it stands, by the architecture's name."""
    part = _PART.search(README.read_text(encoding="utf-8"))
    assert part is not None
    cells = [re.split(r" ?\| ?", line)[1:-1] for line in part[0].splitlines()[3:-1]]
    return {name: (kind, on, off) for name, kind, on, off in cells}


def main() -> None:
    """Write the table."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, build in ARCHITECTURES.items():
            rows[name] = row(build, inspect_folder(written(build, Path(scratch) / name)))
        for name, build in CANNOT.items():
            rows[name] = refusal(build, Path(scratch) / name)
    head = ("architecture", "class", "adapters on", "frozen without one")
    text = table(head, ((name, *cells) for name, cells in rows.items()))
    README.write_text(_PART.sub(lambda part: part[1] + text + part[2], README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
