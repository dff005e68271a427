"""Modules that share A or B: computed once, trained as one, exported as copies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.sharing import SharedProjection
from spectraqlora.settings import TrainSettings
from spectraqlora.steps.train.request import Inputs, TrainRequest
from spectraqlora.steps.train.training import train
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.models.test_adapters import logits, randomize, rank_map

BLOCK = "model.layers.{}."
Q, K, V, OUT = (BLOCK + f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (BLOCK + f"mlp.{name}_proj" for name in ("gate", "up", "down"))
RANK = 3
RANKS = {name.format(layer): RANK for name in (Q, K, V, GATE, UP, OUT, DOWN) for layer in (1, 2)}
GROUPS = {
    name.format(layer): group
    for group, names in enumerate([(Q, K, V), (GATE, UP), (OUT, DOWN)])
    for name in names
    for layer in (1, 2)
}
SHARED = {0: "A", 1: "A", 2: "B"}
IDS = torch.arange(3, 23)[None]


def shared_map(quantized: Path, **settings: Any) -> Any:
    """Two neighbouring blocks: q, k, v share A, gate and up share A, o and down share B."""
    return rank_map(quantized, RANKS, GROUPS, SHARED).model_copy(update={"settings": settings})


def shared_model(quantized: Path, dropout: float = 0.0, **settings: Any) -> Any:
    return adapters.attach(load_four_bit(quantized)[0], shared_map(quantized, **settings), dropout)


def randomize_both(model: torch.nn.Module) -> None:
    randomize(model)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.data.normal_(std=0.05)


class _Products(TorchDispatchMode):
    """Counts products whose second factor is `rank` wide: x·Aᵀ of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.down = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[1].shape[1] == RANK and args[0].shape[0] == IDS.numel():
            self.down += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_groups_product_with_an_input_is_computed_once_in_a_block(quantized: Path, gradients: bool) -> None:
    counts = {}
    for name, groups in (("alone", {}), ("shared", GROUPS)):
        model = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, RANKS, groups, SHARED))
        with torch.set_grad_enabled(gradients), _Products() as products:
            model(input_ids=IDS)
        counts[name] = products.down
    # Two blocks: seven modules each; in place of q, k, v, gate, up one product for attention and one for the MLP.
    assert counts == {"alone": 14, "shared": 8}


@pytest.fixture(scope="module")
def trained(quantized: Path) -> Iterator[Any]:
    model = shared_model(quantized)
    randomize_both(model)
    yield model.eval()


def test_shared_factors_count_once_and_are_one_parameter(quantized: Path) -> None:
    model, ranks = shared_model(quantized), shared_map(quantized)
    layers = adapters.lora_layers(model)
    sizes = {name: layers[name] for name in RANKS}
    own = sum(layer.out_features for name, layer in sizes.items() if SHARED[GROUPS[name]] == "A")
    own += sum(layer.in_features for name, layer in sizes.items() if SHARED[GROUPS[name]] == "B")
    hidden = sizes[Q.format(1)].in_features
    assert adapters.trainable_parameters(model) == RANK * (own + 3 * hidden)
    grouped = adapters.parameter_groups(model, ranks, 0.01, lora_plus_ratio=4.0)
    assert sum(p.numel() for g in grouped for p in g["params"]) == adapters.trainable_parameters(model)
    assert sum(len(g["params"]) for g in grouped) == 3 + 14


def test_training_starts_where_the_function_does_not_jump_and_reaches_every_factor(quantized: Path) -> None:
    model = shared_model(quantized)
    base = logits(load_four_bit(quantized)[0])
    torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(model, shared_map(quantized), 0.01))
    before = adapters.adapter_weights(model)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapters.adapter_weights(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    for name, group in GROUPS.items():
        factor = f"lora_{SHARED[group]}"
        first = next(other for other, same in GROUPS.items() if same == group)
        assert torch.equal(after[f"{name}.{factor}"], after[f"{first}.{factor}"])


def test_gradients_are_those_of_copies_added_up(quantized: Path) -> None:
    shared = shared_model(quantized)
    randomize_both(shared)
    weights = adapters.adapter_weights(shared)
    copies = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, RANKS), start=weights)
    for model in (shared, copies):
        model(input_ids=IDS, labels=IDS).loss.backward()
    one, all_ = adapters.lora_layers(shared), adapters.lora_layers(copies)
    for group, factor in SHARED.items():
        members = [name for name, same in GROUPS.items() if same == group]
        expected = sum(getattr(all_[name], f"lora_{factor}")["default"].weight.grad for name in members)
        actual = getattr(one[members[0]], f"lora_{factor}")["default"].weight.grad
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_the_export_loads_with_peft_alone_and_merges_to_equal_logits(
    variant: str, quantized: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = shared_model(quantized, variant=variant)
    randomize_both(model)
    model.eval()
    expected = logits(model)
    adapters.save(model, tmp_path, "base")
    stored = adapters.read_adapter_weights(tmp_path)
    assert {name for name in stored if "lora_A" in name} == {f"{name}.lora_A" for name in RANKS}
    again = PeftModel.from_pretrained(load_four_bit(quantized)[0], tmp_path).eval()
    assert not [m for m in again.modules() if isinstance(m, SharedProjection)]
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    plain = load_four_bit(quantized)[0].dequantize()
    merged = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload(safe_merge=True).eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    attached = adapters.attach(
        load_four_bit(quantized)[0], shared_map(quantized, variant=variant), start=stored
    )
    torch.testing.assert_close(logits(attached.eval()), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_between_blocks_and_other_inputs_get_their_own_product(quantized: Path) -> None:
    model = shared_model(quantized)
    randomize_both(model)
    first, second = logits(model), model(input_ids=IDS.flip(1)).logits
    assert not torch.equal(first, second)
    assert torch.equal(logits(model), first)
    projections = {m for m in model.modules() if isinstance(m, SharedProjection)}
    assert len(projections) == 2 and all(p._kept is None for p in projections)
    with torch.no_grad():
        for projection in projections:
            projection.weight.mul_(2)
    assert not torch.equal(logits(model), first)


@pytest.mark.parametrize("every", ["off", "on"])
def test_dropout_is_drawn_once_for_a_group_and_recomputation_repeats_it(every: str, quantized: Path) -> None:
    from spectraqlora.models.activations import every_nth, recompute_blocks

    model = shared_model(quantized, dropout=0.5)
    randomize_both(model)
    model.train()
    if nth := every_nth(every, auto=False):
        recompute_blocks(model, nth)
    seen: list[torch.Tensor] = []
    projection = adapters.lora_layers(model)[Q.format(1)].lora_A["default"]
    projection.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    torch.manual_seed(1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    uses = 6 * (1 + (every == "on"))
    assert len(seen) == uses
    by_block = [torch.stack(seen[start : start + 3]) for start in range(0, uses, 3)]
    assert all(torch.equal(block[0], block[i]) for block in by_block for i in (1, 2))
    distinct = {float(block.sum()) for block in by_block}
    assert len(distinct) == 2, "the backward pass sees the forward pass's masks"
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(torch.isfinite(g).all() for g in gradients.values())


def test_half_precision_inputs_are_cast_once_and_get_what_copies_give_them(quantized: Path) -> None:
    shared = shared_model(quantized)
    randomize_both(shared)
    copies = adapters.attach(
        load_four_bit(quantized)[0], rank_map(quantized, RANKS), start=adapters.adapter_weights(shared)
    )
    names = [name.format(1) for name in (Q, K, V)]
    layers, others = adapters.lora_layers(shared), adapters.lora_layers(copies)
    x = torch.randn(1, IDS.numel(), layers[names[0]].in_features, dtype=torch.bfloat16)
    with torch.no_grad(), _Products() as products:
        outputs = [layers[name](x) for name in names]
    assert products.down == 1
    for name, output in zip(names, outputs, strict=True):
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, others[name](x))


def test_a_training_with_shared_factors_resumes_to_the_same_weights(
    quantized: Path, prepared: Path, tmp_path: Path
) -> None:
    from spectraqlora.errors import Stopped
    from spectraqlora.settings import CheckpointSettings
    from spectraqlora.steps.train.between_steps import BetweenSteps

    shared_map(quantized).write(tmp_path / "ranks")
    inputs = Inputs(quantized, prepared, tmp_path / "ranks")
    settings = TrainSettings(max_steps=4, evaluations=2, batch_size=2, lora_dropout=0.1)
    train(TrainRequest(inputs, tmp_path / "whole", 1, train=settings))
    checkpoint = CheckpointSettings(folder=str(tmp_path / "kept"), every_steps=2, every_minutes=0)
    request = TrainRequest(inputs, tmp_path / "again", 1, train=settings, checkpoint=checkpoint)
    ended = BetweenSteps.on_step_begin

    def stop_at_the_third(self: BetweenSteps, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 2:
            raise Stopped(15, "stopped")
        ended(self, args, state, control, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(BetweenSteps, "on_step_begin", stop_at_the_third)
        train(request)
    log = train(request)
    assert len(log.loss_curve) == 4
    whole, again = (adapters.read_adapter_weights(tmp_path / name) for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
