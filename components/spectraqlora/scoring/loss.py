"""Loss over rows, and exact-match accuracy by generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectraqlora.scoring.batches import Collator, attention_by_position
from spectraqlora.scoring.head_loss import HeadLoss
from spectraqlora.scoring.statistics import difference_stderr


@dataclass(frozen=True)
class Score:
    """Summed loss (nats) and counted tokens of every row."""

    losses: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """Mean loss per counted token, nats."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def stderr(self) -> float:
        """Standard error of `loss`, that of a ratio of row sums (rows are independent)."""
        return difference_stderr(self.losses, [0.0] * len(self.losses), self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss), finite for every loss."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def score(
    model: Any, rows: Any, batch_size: int, head: HeadLoss | None = None, packing: bool = False
) -> Score:
    """Losses of all rows; logits exist only for positions that count, a chunk at a time.

    Args:
        model: language model.
        rows: tokenized rows.
        batch_size: rows per forward pass.
        head: that of the training under way, where there is one.
        packing: let the rows of a batch share sequences.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    padding, collate = Collator.of(model.config), Collator.of(model.config, packing)
    head = head or HeadLoss(model, {k: v.to(device) for k, v in padding([rows[0]]).items()})
    sums: list[float] = []
    counts: list[int] = []
    with head.hidden_states(), attention_by_position(model):
        for start in range(0, len(rows), batch_size):
            part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch, places = collate.packed(part) if packing else (collate(part), None)
            labels = batch.pop("labels").to(device)
            outputs = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)
            counted = head.counted(labels).cpu()
            owners = torch.arange(len(part))[:, None].expand_as(counted) if places is None else places[:, 1:]
            losses = head.losses(*head.kept(outputs.logits, labels)).double().cpu()
            sums += torch.zeros(len(part), dtype=torch.float64).index_add(0, owners[counted], losses).tolist()
            counts += torch.bincount(owners[counted], minlength=len(part)).tolist()
    model.train(training)
    return Score(sums, counts)


def final_answer(text: str) -> str:
    """What counts of an answer: what follows its thinking, of that the part after `####` (GSM8K) or all.

    Case, outer blanks and a full stop do not count.
    """
    return text.split("</think>")[-1].split("####")[-1].strip().casefold().rstrip(".")


@torch.no_grad()
def accuracy(
    model: Any,
    tokenizer: Any,
    answers: list[dict[str, str]],
    max_new_tokens: int,
    batch_size: int,
    ends: Sequence[int] = (),
) -> float | None:
    """Share of answers that greedy generation gives exactly; None where no answer can be scored.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        answers: `prompt`, as the model reads it, and `answer`.
        max_new_tokens: longer answers are not scored.
        batch_size: prompts at a time.
        ends: tokens that end an answer, besides those that model and tokenizer name.
    """
    usable = [a for a in answers if len(tokenizer(a["answer"])["input_ids"]) <= max_new_tokens]
    if not usable:
        return None
    model.eval()
    stops = stop_tokens(model, tokenizer, ends)
    pad = next((t for t in (tokenizer.pad_token_id, *stops) if t is not None), 0)
    right = 0
    for start in range(0, len(usable), batch_size):
        part = usable[start : start + batch_size]
        prompts = [tokenizer(a["prompt"], add_special_tokens=False)["input_ids"] for a in part]
        inputs = _left_padded(prompts, pad, next(model.parameters()).device)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=stops or None,
        )
        if not model.config.is_encoder_decoder:
            output = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        right += sum(final_answer(t) == final_answer(a["answer"]) for t, a in zip(texts, part, strict=True))
    return right / len(usable)


def stop_tokens(model: Any, tokenizer: Any, ends: Sequence[int] = ()) -> list[int]:
    """Tokens that end an answer: the model's, its tokenizer's, and the given ones."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *ends]
    return list(dict.fromkeys(int(token) for token in named if token is not None))


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (rows x tokens)."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.as_tensor(row, dtype=torch.long)
        mask[index, length - len(row) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
