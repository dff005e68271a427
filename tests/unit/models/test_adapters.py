"""Adapters are exactly what the rank map says, and stay it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from spectraqlora.artifacts import FourBitModel, ModuleRank, RankMap
from spectraqlora.errors import InputError
from spectraqlora.methods.carry_over import carry_over
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit
from spectraqlora.settings import ModelSettings
from spectraqlora.steps.quantize_load.quantize import quantize


def rank_map(
    quantized: Path,
    ranks: dict[str, int],
    groups: dict[str, int] | None = None,
    shared: dict[int, str] | None = None,
) -> RankMap:
    """Of the tiny model: ranks by module, groups by module, and what a group shares where that is no pair."""
    manifest = FourBitModel.read(quantized)
    return RankMap(
        method="alors",
        round=1,
        base_digest=manifest.base_digest,
        settings={},
        modules=[
            ModuleRank(
                module=m.module,
                type=m.type,
                layer=m.layer,
                tier="high" if ranks.get(m.module) else "frozen-base",
                rank=ranks.get(m.module, 0),
                alpha=2.0 * ranks.get(m.module, 0),
                group=(groups or {}).get(m.module),
                shared=(shared or {}).get((groups or {}).get(m.module, -1), "pair"),
            )
            for m in manifest.modules
        ],
    )


Q0, Q1, DOWN = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.2.mlp.down_proj",
)


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits


def test_mixed_ranks_reload_with_peft_alone_and_identical_logits(quantized: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    wrapped = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {Q0: 2, Q1: 8, DOWN: 4}))
    randomize(wrapped)
    wrapped.eval()
    before = logits(wrapped)
    adapters.save(wrapped, tmp_path, "base")
    again = PeftModel.from_pretrained(load_four_bit(quantized)[0], tmp_path).eval()
    assert torch.equal(logits(again), before)
    assert set(adapters.lora_layers(wrapped)) == {Q0, Q1, DOWN}


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_an_exports_scaling_cannot_be_misread(quantized: Path, tmp_path: Path, variant: str) -> None:
    """Alphas that no one number stands for; the reader here knows `lora_alpha`, `r` and the tensors, as servers do."""
    mixed = rank_map(quantized, {Q0: 8, Q1: 3, DOWN: 5})
    mixed.settings["variant"] = variant
    for entry, alpha in zip(mixed.active(), (16.0, 20.0, 4.0), strict=True):
        entry.alpha = alpha
    wrapped = adapters.attach(load_four_bit(quantized)[0], mixed)
    randomize(wrapped)
    adapters.save(wrapped, tmp_path, "base")
    before = logits(wrapped.eval())
    trained = adapters.read_adapter_weights(tmp_path)
    adapters.settle_scaling(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["base_model_name_or_path"] == "base"
    read = adapters.read_adapter_weights(tmp_path)
    for entry in mixed.active():
        product = read[f"{entry.module}.lora_B"] @ read[f"{entry.module}.lora_A"]
        meant = trained[f"{entry.module}.lora_B"] @ trained[f"{entry.module}.lora_A"]
        torch.testing.assert_close(
            product * config["lora_alpha"] / config["r"], mixed.scaling(entry) * meant, rtol=1e-5, atol=1e-7
        )
    again = adapters.with_adapter(load_four_bit(quantized)[0], tmp_path)
    torch.testing.assert_close(logits(again.eval()), before, rtol=1e-5, atol=1e-5)


def test_an_export_whose_scaling_is_one_number_stays_as_it_was_trained(
    quantized: Path, tmp_path: Path
) -> None:
    wrapped = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {Q0: 8, Q1: 3}))
    randomize(wrapped)
    adapters.save(wrapped, tmp_path, "base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    adapters.settle_scaling(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shared_pairs_count_once_stay_shared_and_export_as_copies(quantized: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    alone = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {Q0: 4, Q1: 4}))
    shared_map = rank_map(quantized, {Q0: 4, Q1: 4}, {Q0: 0, Q1: 0})
    shared = adapters.attach(load_four_bit(quantized)[0], shared_map)
    assert adapters.trainable_parameters(alone) == 2 * adapters.trainable_parameters(shared)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(shared, shared_map, 0.01))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2
    ids = torch.arange(3, 23)[None]
    for _ in range(3):
        shared(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = adapters.adapter_weights(shared)
    assert torch.equal(weights[f"{Q0}.lora_B"], weights[f"{Q1}.lora_B"])
    assert weights[f"{Q0}.lora_B"].abs().sum() > 0
    shared.eval()
    adapters.save(shared, tmp_path, "base")
    again = PeftModel.from_pretrained(load_four_bit(quantized)[0], tmp_path).eval()
    assert torch.equal(logits(again), logits(shared))


def test_growing_keeps_the_function_and_shrinking_stays_within_its_reported_error(quantized: Path) -> None:
    old = rank_map(quantized, {Q0: 4, DOWN: 4})
    wrapped = adapters.attach(load_four_bit(quantized)[0], old)
    randomize(wrapped)
    weights = adapters.adapter_weights(wrapped)
    new = rank_map(quantized, {Q0: 8, DOWN: 2}).model_copy(update={"round": 2})
    carried, errors = carry_over(weights, old, new, seed=1)

    def product(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]

    assert carried[f"{Q0}.lora_A"].shape[0] == 8
    torch.testing.assert_close(product(carried, Q0), product(weights, Q0), rtol=0, atol=0)
    assert carried[f"{Q0}.lora_A"][4:].abs().min() > 0
    drift = (product(carried, DOWN) - product(weights, DOWN)).norm() / product(weights, DOWN).norm()
    assert float(drift) == pytest.approx(errors[DOWN], rel=1e-3)
    assert 0 < errors[DOWN] < 1


def test_learning_rates_follow_the_map(quantized: Path) -> None:
    ranks = rank_map(quantized, {Q0: 4, DOWN: 4})
    ranks.modules = [m.model_copy(update={"lr_scale": 3.0}) if m.module == Q0 else m for m in ranks.modules]
    wrapped = adapters.attach(load_four_bit(quantized)[0], ranks)
    groups = adapters.parameter_groups(wrapped, ranks, 1e-3)
    assert [g["lr"] for g in groups] == pytest.approx([1e-3, 3e-3])


def test_lora_plus_gives_b_a_rate_of_its_own(quantized: Path) -> None:
    ranks = rank_map(quantized, {Q0: 4})
    wrapped = adapters.attach(load_four_bit(quantized)[0], ranks)
    groups = adapters.parameter_groups(wrapped, ranks, 1e-3, lora_plus_ratio=16)
    layer = adapters.lora_layers(wrapped)[Q0]
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    assert rates[id(layer.lora_A["default"].weight)] == pytest.approx(1e-3)
    assert rates[id(layer.lora_B["default"].weight)] == pytest.approx(1.6e-2)


def test_frozen_tiers_do_not_train(quantized: Path) -> None:
    ranks = rank_map(quantized, {Q0: 4, DOWN: 4})
    ranks.modules = [m.model_copy(update={"tier": "frozen"}) if m.module == Q0 else m for m in ranks.modules]
    wrapped = adapters.attach(load_four_bit(quantized)[0], ranks)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all(DOWN in name for name in trained)


def test_a_rank_map_of_another_base_is_refused(quantized: Path) -> None:
    with pytest.raises(InputError, match="another one"):
        rank_map(quantized, {Q0: 4}).check_base("0" * 64)


def test_a_merged_adapter_gives_the_adapters_logits(quantized: Path) -> None:
    base = load_four_bit(quantized)[0].dequantize()
    wrapped = adapters.attach(base, rank_map(quantized, {Q0: 4, DOWN: 8}))
    randomize(wrapped)
    wrapped.eval()
    before = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_saving_an_adapter_of_a_base_on_the_hub_asks_no_hub(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, hf_api

    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # The client that the library's functions share has its address from when it was loaded.
        monkeypatch.setattr(hf_api.api, "endpoint", f"http://127.0.0.1:{server.server_address[1]}")
        wrapped = adapters.attach(load_four_bit(quantized)[0], rank_map(quantized, {Q0: 4}))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        adapters.save(wrapped, tmp_path, "owner/base")
        server.shutdown()
    assert asked == []
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "owner/base"


@pytest.mark.parametrize("groups", [{}, {Q0: 0, Q1: 0}])
def test_on_a_gpu_adapters_multiply_in_bfloat16_as_under_autocast_and_stay_float32(
    tiny_model: Path, tmp_path: Path, groups: dict[str, int]
) -> None:
    settings = ModelSettings(base_model=str(tiny_model), compute_dtype="bfloat16")
    quantize(settings, tmp_path / "four_bit", tmp_path / "outline")
    ranks = rank_map(
        tmp_path / "four_bit", {Q0: 4, Q1: 4, DOWN: 3}, groups, dict.fromkeys(groups.values(), "A")
    )
    results = []
    for cuda in (False, True):
        torch.manual_seed(4)
        model = adapters.attach(load_four_bit(tmp_path / "four_bit")[0], ranks, cuda=cuda)
        randomize(model)
        layer = adapters.lora_layers(model)[Q0]
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2)).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=not cuda):
            output = layer(x)
        output.float().square().sum().backward()
        gradients = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        results.append([output, *gradients])
        assert output.dtype == torch.bfloat16
        assert all(g.dtype == torch.float32 for g in gradients)
        adapters.save(model, tmp_path / f"saved-{cuda}", "base")
    for ours, autocast in zip(*results[::-1], strict=True):
        assert torch.equal(ours, autocast)
    one, other = (adapters.read_adapter_weights(tmp_path / f"saved-{cuda}") for cuda in (False, True))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
