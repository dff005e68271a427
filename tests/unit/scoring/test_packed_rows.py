"""Rows that share sequences: each has the loss that it has by itself, in every family that may do so."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectraqlora.artifacts import IGNORED
from spectraqlora.errors import InputError
from spectraqlora.models.families import PACKABLE, check_packable
from spectraqlora.scoring.batches import Collator, Packing
from spectraqlora.scoring.loss import score

from tests.families import MIXING, PACKED


def _rows(seed: int = 0) -> list[dict[str, list[int]]]:
    choose = random.Random(seed)
    rows = []
    for length in (5, 17, 40, 2, 64, 23, 31, 12):
        ids = [choose.randrange(3, 200) for _ in range(length)]
        prompt = choose.randrange(0, length - 1)
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


ROWS = _rows()


def _model(build: Any) -> Any:
    torch.manual_seed(0)
    model = build(256).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # So that what is seen makes a difference.
                parameter.mul_(4)
    return model


def _furthest(model: Any) -> float:
    alone, packed = score(model, ROWS, 8), score(model, ROWS, 8, packing=True)
    assert alone.tokens == packed.tokens
    pairs = zip(alone.losses, packed.losses, alone.tokens, strict=True)
    return max(abs(one - other) / count for one, other, count in pairs)


@pytest.mark.parametrize("name", PACKED)
def test_a_row_has_the_loss_that_it_has_by_itself(name: str) -> None:
    model = _model(PACKED[name])
    check_packable(model.config)
    assert model.config.model_type == name
    batch = Collator.of(model.config, packing=True)(ROWS)
    assert len(batch["input_ids"]) < len(ROWS), "rows share sequences"
    assert _furthest(model) < 1e-6


def test_every_family_that_may_share_sequences_is_tried() -> None:
    assert set(PACKED) == PACKABLE


@pytest.mark.parametrize("name", MIXING)
def test_a_family_that_mixes_rows_is_refused_by_name(name: str) -> None:
    model = _model(MIXING[name])
    assert _furthest(model) > 1e-3
    with pytest.raises(InputError, match=rf"data\.packing: .*off; {model.config.model_type} mixes"):
        check_packable(model.config)


def test_gradients_are_those_of_rows_by_themselves() -> None:
    from spectraqlora.scoring.batches import attention_by_position

    model = _model(PACKED["llama"])
    slopes = []
    for packing in (False, True):
        model.zero_grad()
        with attention_by_position(model):
            model(**Collator.of(model.config, packing)(ROWS)).loss.backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*slopes, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=24), st.sampled_from([16, 512, 8192]))
def test_every_row_is_in_one_sequence_and_padding_costs_more(lengths: list[int], width: int) -> None:
    packing = Packing(width)
    sequences = packing.sequences(lengths)
    assert sorted(place for sequence in sequences for place in sequence) == list(range(len(lengths)))
    alone = [[place] for place in range(len(lengths))]
    assert packing._cost(lengths, sequences) <= packing._cost(lengths, alone)
    assert len(Packing(width, single=True).sequences(lengths)) == 1


def test_a_token_says_whose_it_is() -> None:
    batch, places = Collator(0, None, Packing(4096)).packed(ROWS)
    assert batch["attention_mask"].sum() == (places >= 0).sum() == sum(len(row["input_ids"]) for row in ROWS)
    for place, row in enumerate(ROWS):
        own = places == place
        assert batch["input_ids"][own].tolist() == row["input_ids"]
        assert batch["position_ids"][own].tolist() == list(range(len(row["input_ids"])))
        assert batch["labels"][own].tolist() == [IGNORED, *row["labels"][1:]]
