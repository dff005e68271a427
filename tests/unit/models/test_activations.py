"""What the backward pass keeps: activation functions and products are recomputed, to the bit."""

from pathlib import Path

import pytest
import torch
from spectraqlora.models import activations, adapters
from spectraqlora.models.activations import recompute_blocks, recompute_elementwise
from spectraqlora.models.loading import load_four_bit

from tests.unit.models.test_adapters import DOWN, Q0, randomize, rank_map


def _backward(model: torch.nn.Module) -> list[torch.Tensor]:
    ids = torch.arange(3, 23)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def test_gradients_of_a_model_stay_the_same_to_the_bit(quantized: Path) -> None:
    model = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {Q0: 4, DOWN: 4}))
    randomize(model)
    plain = _backward(model)
    with recompute_elementwise():
        recomputed = _backward(model)
    assert len(plain) == 4
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_a_gated_layer_keeps_its_input_and_two_matrix_products_alone(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, up, down = (torch.randn(size, requires_grad=True) for size in ((8, 4), (8, 4), (4, 8)))
    inputs = torch.randn(3, 4)
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> object:
        packed = activations._pack(tensor)
        if isinstance(packed, torch.Tensor):
            kept.add(packed.untyped_storage().data_ptr())
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, activations._unpack):
        opened, carried = inputs @ gate.T, inputs @ up.T
        product = getattr(torch.nn.functional, function)(opened) * carried
        loss = (product.view(1, 3, 8) @ down.T).sum()
    weights = {weight.data_ptr() for weight in (gate, up, down)}
    assert kept - weights == {tensor.data_ptr() for tensor in (inputs, opened, carried)}
    loss.backward()
    assert all(weight.grad is not None for weight in (gate, up, down))


@pytest.mark.parametrize("every", [1, 3])
def test_recomputed_blocks_keep_gradients_and_force_none_below_the_first_adapter(
    every: int, quantized: Path
) -> None:
    model = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {DOWN: 4}))
    randomize(model)
    model.train()
    plain = _backward(model)
    recompute_blocks(model, every)
    runs: list[int] = []
    for index, block in enumerate(model.get_base_model().model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    again = _backward(model)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    # The adapter is in block 2: blocks 0 and 1 have no backward pass in which to run again.
    assert sorted(runs) == sorted([0, 1, 2, 3] + [index for index in (2, 3) if index % every == 0])
    hidden = model(input_ids=torch.arange(3, 23)[None], output_hidden_states=True).hidden_states
    assert [states.requires_grad for states in hidden] == [False, False, False, True, True]
