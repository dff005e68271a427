"""Loss over rows, and exact-match accuracy by generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from spectraqlora.scoring.batches import Collator
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
def score(model: Any, rows: Any, batch_size: int, head: HeadLoss | None = None) -> Score:
    """Losses of all rows; logits exist only for positions that count, a chunk at a time.

    Args:
        model: language model.
        rows: tokenized rows.
        batch_size: rows per forward pass.
        head: that of the training under way, where there is one.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    collate = Collator.of(model.config)
    head = head or HeadLoss(model, {k: v.to(device) for k, v in collate([rows[0]]).items()})
    sums: list[float] = []
    counts: list[int] = []
    with head.hidden_states():
        for batch in collate.batches(rows, batch_size):
            labels = batch.pop("labels").to(device)
            outputs = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)
            per_row = head.counted(labels).sum(1)
            losses = head.losses(*head.kept(outputs.logits, labels)).double().cpu()
            sums += [float(part.sum()) for part in losses.split(per_row.tolist())]
            counts += per_row.tolist()
    model.train(training)
    return Score(sums, counts)


def final_answer(text: str) -> str:
    """What counts of an answer: the part after `####` (GSM8K) or all, without case and outer blanks."""
    return text.split("####")[-1].strip().casefold().rstrip(".")


@torch.no_grad()
def accuracy(
    model: Any, tokenizer: Any, answers: list[dict[str, str]], max_new_tokens: int, batch_size: int
) -> float | None:
    """Share of answers that greedy generation gives exactly; None where no answer can be scored."""
    usable = [a for a in answers if len(tokenizer(a["answer"])["input_ids"]) <= max_new_tokens]
    if not usable:
        return None
    model.eval()
    device = next(model.parameters()).device
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    right = 0
    for start in range(0, len(usable), batch_size):
        part = usable[start : start + batch_size]
        inputs = tokenizer(
            [a["prompt"] for a in part], return_tensors="pt", padding=True, add_special_tokens=False
        )
        inputs = {k: v.to(device) for k, v in inputs.items() if k != "token_type_ids"}
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        if not model.config.is_encoder_decoder:
            output = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        right += sum(final_answer(t) == final_answer(a["answer"]) for t, a in zip(texts, part, strict=True))
    tokenizer.padding_side = side
    return right / len(usable)
