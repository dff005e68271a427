"""A rank map turned into exactly the right PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spectraqlora.artifacts import RankMap

_ADAPTER = "default"


def lora_config(ranks: RankMap, dropout: float = 0.0) -> Any:
    """PEFT config naming every active module with its own rank and alpha."""
    from peft import LoraConfig

    active = ranks.active()
    first = active[0]
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules=[m.module for m in active],
        rank_pattern={m.module: m.rank for m in active if m.rank != first.rank},
        alpha_pattern={m.module: m.alpha for m in active if m.alpha != first.alpha},
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )


def lora_layers(model: Any) -> dict[str, Any]:
    """LoRA layers of a PEFT model by the base model's module name."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def attach(
    model: Any,
    ranks: RankMap,
    dropout: float = 0.0,
    start: dict[str, torch.Tensor] | None = None,
    gradient_init: dict[str, torch.Tensor] | None = None,
) -> Any:
    """Wrap `model` with the map's adapters; shared groups use one (A, B) pair; `frozen` ones do not train.

    Args:
        model: the frozen base model.
        ranks: the rank map.
        dropout: on the adapters' input.
        start: weights from an earlier round, `module.lora_A` (rank x in) and `module.lora_B` (out x rank).
        gradient_init: per group index the first A (rank x in).
    """
    from peft import get_peft_model

    wrapped = get_peft_model(model, lora_config(ranks, dropout), autocast_adapter_dtype=True)
    layers = lora_layers(wrapped)
    leader: dict[int, Any] = {}
    with torch.no_grad():
        for entry in ranks.active():
            layer = layers[entry.module]
            if entry.group is not None:
                if entry.group in leader:
                    layer.lora_A[_ADAPTER] = leader[entry.group].lora_A[_ADAPTER]
                    layer.lora_B[_ADAPTER] = leader[entry.group].lora_B[_ADAPTER]
                    continue
                leader[entry.group] = layer
                if gradient_init and str(entry.group) in gradient_init:
                    layer.lora_A[_ADAPTER].weight.copy_(gradient_init[str(entry.group)])
            if start and f"{entry.module}.lora_A" in start:
                layer.lora_A[_ADAPTER].weight.copy_(start[f"{entry.module}.lora_A"])
                layer.lora_B[_ADAPTER].weight.copy_(start[f"{entry.module}.lora_B"])
    for entry in ranks.active():
        if entry.tier == "frozen":
            for matrix in (layers[entry.module].lora_A, layers[entry.module].lora_B):
                matrix[_ADAPTER].weight.requires_grad_(False)
    return wrapped


def parameter_groups(model: Any, ranks: RankMap, learning_rate: float) -> list[dict[str, Any]]:
    """Optimizer groups, one per learning rate; a shared pair stands in one group, once."""
    layers = lora_layers(model)
    grouped: dict[float, list[torch.nn.Parameter]] = {}
    seen: set[int] = set()
    for entry in ranks.active():
        for matrix in (layers[entry.module].lora_A, layers[entry.module].lora_B):
            weight = matrix[_ADAPTER].weight
            if weight.requires_grad and id(weight) not in seen:
                seen.add(id(weight))
                grouped.setdefault(round(learning_rate * entry.lr_scale, 12), []).append(weight)
    return [{"params": parameters, "lr": rate} for rate, parameters in sorted(grouped.items())]


def trainable_parameters(model: Any) -> int:
    """Distinct trainable numbers; a shared pair counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def pairs(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all adapter weights: `module.lora_A` (rank x in) and `module.lora_B` (out x rank)."""
    found = {}
    for name, layer in lora_layers(model).items():
        found[f"{name}.lora_A"] = layer.lora_A[_ADAPTER].weight.detach().float().cpu().clone()
        found[f"{name}.lora_B"] = layer.lora_B[_ADAPTER].weight.detach().float().cpu().clone()
    return found


def restore(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put `pairs` back."""
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A[_ADAPTER].weight.copy_(weights[f"{name}.lora_A"])
            layer.lora_B[_ADAPTER].weight.copy_(weights[f"{name}.lora_B"])


def save(model: Any, folder: Path, base_model: str) -> None:
    """Write a standard PEFT adapter; every member of a group gets its own copy."""
    model.peft_config[_ADAPTER].base_model_name_or_path = base_model
    model.save_pretrained(folder, safe_serialization=True)


def read_pairs(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a saved PEFT adapter under the names that `pairs` uses."""
    from safetensors.torch import load_file

    found = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        found[key.removeprefix("base_model.model.").removesuffix(".weight")] = value.float()
    return found
