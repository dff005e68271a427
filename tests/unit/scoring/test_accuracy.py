"""Answers by greedy generation: where they end, and what counts of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spectraqlora.scoring.loss import accuracy, final_answer, stop_tokens

from tests.chat_templates import plain_tokenizer, tokenizer_of

ANSWERS = [{"prompt": "x\na", "answer": "b"}, {"prompt": "say it\np", "answer": "q"}]


@pytest.fixture(scope="module")
def model() -> Any:
    """After a it writes b, then the end of a turn, then c, then itself; after p the same with q."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of("chatml")
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    place = tokenizer.convert_tokens_to_ids
    follows = {"a": "b", "b": "<|im_end|>", "<|im_end|>": "c", "p": "q", "q": "<|im_end|>"}
    with torch.no_grad():
        for weight in (made.model.embed_tokens.weight, made.lm_head.weight):
            weight.zero_()
            weight.fill_diagonal_(1)
        for part in (made.model.layers[0].self_attn.o_proj, made.model.layers[0].mlp.down_proj):
            part.weight.zero_()
        for token, following in follows.items():
            made.lm_head.weight[place(token), place(token)] = 0
            made.lm_head.weight[place(following), place(token)] = 1
    return made


def test_an_answer_ends_with_the_token_that_ends_a_turn(model: Any) -> None:
    tokenizer = tokenizer_of("chatml")
    assert accuracy(model, tokenizer, ANSWERS, 4, 2) == 0, "what follows the end of the turn is not cut off"
    assert accuracy(model, tokenizer, ANSWERS, 4, 2, [tokenizer.convert_tokens_to_ids("<|im_end|>")]) == 1
    wrong = [{**ANSWERS[0], "answer": "c"}, ANSWERS[1]]
    assert accuracy(model, tokenizer, wrong, 4, 2, [tokenizer.convert_tokens_to_ids("<|im_end|>")]) == 0.5


def test_answers_are_scored_without_a_token_for_padding_or_for_the_end(model: Any) -> None:
    tokenizer = plain_tokenizer("<s>", None)
    assert tokenizer.pad_token_id is None and stop_tokens(model, tokenizer) == []
    whole = [{**answer, "answer": answer["answer"] + "cc"} for answer in ANSWERS]
    assert accuracy(model, tokenizer, whole, 4, 2) == accuracy(model, tokenizer, whole, 4, 1) == 1


def test_what_counts_of_an_answer_follows_its_thinking() -> None:
    assert final_answer("<think>\nis it Oslo?\n</think>\n\nBergen.") == final_answer("bergen")
    assert final_answer("so #### 7") == "7"
