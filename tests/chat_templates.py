"""Chat templates in the shapes of the known families, with what a model has to write itself in each.

The templates in `templates/` are written from their formats; what is learned of an answer stands here, apart from the
code that finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = [
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|User|>",
    "<|Assistant|>",
    "<|tool_calls_begin|>",
    "<|tool_calls_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_sep|>",
    "<|tool_outputs_begin|>",
    "<|tool_outputs_end|>",
    "<|tool_output_begin|>",
    "<|tool_output_end|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_text|>",
    "<|tool_call|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|call|>",
    "<|return|>",
    "<reserved_106>",
    "<reserved_107>",
    "<unk>",
    "<pad>",
]
UNSPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens of their own that belong to the text, as Qwen's tokenizers have them."""


@dataclass(frozen=True)
class Family:
    """A template and what is known of it.

    Args:
        answer: what the model writes for a content; the second says whether the conversation ends there.
        bos: token that begins a text.
        eos: the tokenizer's end of sequence.
        end: token that ends an answer at a conversation's end; empty where none does.
        system: what becomes of a system message.
        tools: whether it writes tools, calls and results.
    """

    answer: Callable[[str, bool], str]
    bos: str
    eos: str
    end: str
    system: Literal["own", "refused"] = "own"
    tools: bool = False


def _ends(end: str, lead: str = "", strip: bool = False) -> Callable[[str, bool], str]:
    return lambda content, last: lead + (content.strip() if strip else content) + end


IM = "<|im_end|>"
FAMILIES = {
    "chatml": Family(_ends(IM), "<s>", "<|endoftext|>", IM),
    "chatml_default_system": Family(_ends(IM, strip=True), "<s>", "<|endoftext|>", IM),
    "chatml_generation": Family(_ends(IM), "<s>", IM, IM),
    "chatml_no_prompt": Family(_ends(IM), "<s>", IM, IM),
    "llama_2": Family(_ends(" </s>", " ", strip=True), "<s>", "</s>", "</s>"),
    "llama_3": Family(_ends("<|eot_id|>", strip=True), "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "llama_3_tools": Family(
        _ends("<|eot_id|>", strip=True), "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", tools=True
    ),
    "llama_4": Family(_ends("<|eot|>"), "<|begin_of_text|>", "<|end_of_text|>", "<|eot|>"),
    "mistral_v1": Family(_ends("</s>"), "<s>", "</s>", "</s>", system="refused"),
    "mistral_v3": Family(_ends("</s>", " ", strip=True), "<s>", "</s>", "</s>", tools=True),
    "mistral_tekken": Family(_ends("</s>"), "<s>", "</s>", "</s>"),
    "gemma_2": Family(
        _ends("<end_of_turn>", strip=True), "<bos>", "<eos>", "<end_of_turn>", system="refused"
    ),
    "gemma_3": Family(_ends("<end_of_turn>", strip=True), "<bos>", "<eos>", "<end_of_turn>"),
    "phi_3": Family(_ends("<|end|>"), "<s>", "<|endoftext|>", "<|end|>"),
    "phi_4": Family(_ends(IM), "<|endoftext|>", "<|endoftext|>", IM),
    "qwen_25": Family(_ends(IM), "<s>", "<|endoftext|>", IM, tools=True),
    "qwen_3": Family(
        lambda content, last: ("<think>\n\n</think>\n\n" + content.lstrip("\n") if last else content) + IM,
        "<s>",
        IM,
        IM,
        tools=True,
    ),
    "qwen_3_thinking": Family(lambda content, last: content.lstrip("\n") + IM, "<s>", IM, IM),
    "deepseek_v2": Family(_ends("</s>", " "), "<s>", "</s>", "</s>"),
    "deepseek_v3": Family(_ends("</s>"), "<s>", "</s>", "</s>", tools=True),
    "deepseek_r1": Family(_ends("</s>"), "<s>", "</s>", "</s>"),
    "command_r": Family(
        _ends("<|END_OF_TURN_TOKEN|>", strip=True), "<s>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    ),
    "zephyr": Family(_ends("</s>"), "<s>", "</s>", "</s>"),
    "granite": Family(
        _ends("<|end_of_text|>"), "<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>", tools=True
    ),
    "olmo_2": Family(_ends("<|endoftext|>"), "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "falcon": Family(
        lambda content, last: " " + content.strip().replace("\r\n", "\n").replace("\n\n", "\n"),
        "<s>",
        "<|endoftext|>",
        "",
    ),
    "falcon_3": Family(_ends("<|endoftext|>"), "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "gpt_oss": Family(
        lambda content, last: f"<|channel|>final<|message|>{content}{'<|return|>' if last else '<|end|>'}",
        "<s>",
        "<|return|>",
        "<|return|>",
        tools=True,
    ),
    "smollm_3": Family(lambda content, last: content.lstrip("\n") + IM, "<s>", IM, IM),
    "vicuna": Family(_ends("</s>", " ", strip=True), "<s>", "</s>", "</s>"),
    "baichuan": Family(_ends(""), "<s>", "</s>", ""),
}


@lru_cache
def _bytes() -> Any:
    """Byte-level BPE with a few merges: every text has tokens, and comes back from them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox says hello \n\n again, and again \n the end"] * 4, trainer
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in UNSPECIAL])
    return tokenizer


@lru_cache
def tokenizer_of(name: str) -> Any:
    """A tokenizer with the family's template and special tokens."""
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    made = PreTrainedTokenizerFast(
        tokenizer_object=_bytes(), bos_token=family.bos, eos_token=family.eos, pad_token="<pad>"
    )
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return made


def plain_tokenizer(bos: str | None = "<s>", eos: str | None = "</s>") -> Any:
    """The same tokens without a template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=_bytes(), bos_token=bos, eos_token=eos)
