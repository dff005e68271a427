"""Loss over rows, and exact-match accuracy by generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from spectraqlora.rows import IGNORED, batches


@dataclass(frozen=True)
class Score:
    """Mean loss per counted token (nats) and its standard error over rows."""

    loss: float
    stderr: float
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def score(model: Any, rows: Any, batch_size: int, pad: int) -> Score:
    """Token-weighted loss; the standard error is that of a ratio of row sums (rows are independent).

    Only positions that count are turned into logits' log-probabilities, one batch at a time.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums: list[float] = []
    counts: list[int] = []
    for batch in batches(rows, batch_size, pad):
        labels = batch.pop("labels").to(device)[:, 1:]
        logits = model(**{k: v.to(device) for k, v in batch.items()}).logits[:, :-1]
        keep = labels != IGNORED
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=device)
        losses[keep] = torch.nn.functional.cross_entropy(logits[keep].float(), labels[keep], reduction="none")
        sums += losses.double().sum(1).tolist()
        counts += keep.sum(1).tolist()
    model.train(training)
    tokens = sum(counts)
    loss = sum(sums) / tokens
    residuals = [s - loss * n for s, n in zip(sums, counts, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals) * len(sums) / max(len(sums) - 1, 1)) / tokens
    return Score(loss, spread, len(sums))


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
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(final_answer(t) == final_answer(a["answer"]) for t, a in zip(texts, part, strict=True))
    tokenizer.padding_side = side
    return right / len(usable)
