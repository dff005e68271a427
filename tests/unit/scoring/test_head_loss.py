"""The loss without all logits: the model's own numbers, from labelled positions a chunk at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from spectraqlora.artifacts import IGNORED
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit, load_plain
from spectraqlora.scoring import head_loss
from spectraqlora.scoring.head_loss import HeadLoss

from tests.families import write_family
from tests.unit.models.test_adapters import DOWN, Q0, randomize, rank_map


def batch(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :12] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: Any) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def test_loss_and_gradients_are_the_models_own_chunk_by_chunk(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {Q0: 4, DOWN: 4}))
    randomize(model)
    inputs = batch(model)
    own = model(**inputs).loss
    own.backward()
    expected = gradients(model)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 4 * vocabulary * 7)
    head = HeadLoss(model, inputs)
    assert head.from_hidden
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    labels = inputs.pop("labels")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), head.hidden_states():
        loss = head(model(**inputs), labels)
    assert not any(shape and shape[-1] == vocabulary for shape in kept)
    loss.backward()
    torch.testing.assert_close(loss, own)
    for one, other in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_every_positions_loss_has_its_own_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(6, 11)
    head.requires_grad_(False)
    states = torch.randn(5, 6, generator=generator, requires_grad=True)
    targets, scale = torch.tensor([0, 3, 10, 3, 7]), torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    losses = head_loss._FrozenHead.apply(states, targets, head.weight, head.bias, 2)
    expected = torch.nn.functional.cross_entropy(head(states), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    (one,) = torch.autograd.grad((losses * scale).sum(), states)
    (other,) = torch.autograd.grad((expected * scale).sum(), states)
    torch.testing.assert_close(one, other)


def test_a_head_with_more_than_a_linear_layer_keeps_its_own_logits(tmp_path: Path) -> None:
    model = load_plain(write_family("gemma2", tmp_path), torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(300)  # so that the soft cap bites
    inputs = batch(model)
    head = HeadLoss(model, inputs)
    assert not head.from_hidden
    labels = inputs.pop("labels")
    with torch.no_grad(), head.hidden_states():
        found = head(model(**inputs), labels)
        torch.testing.assert_close(found, model(**inputs, labels=labels).loss)
