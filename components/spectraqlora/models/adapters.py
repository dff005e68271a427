"""A rank map turned into exactly the right PEFT adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from spectraqlora.artifacts import LinearModule, ModuleRank, RankMap
from spectraqlora.models.hardware import device
from spectraqlora.models.sharing import keep_input_types, share_factors
from spectraqlora.runtime.console import warn

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name of a saved adapter's weights."""
_ADAPTER = "default"
_SAVED = "base_model.model."
"""What PEFT puts before a module's name."""
_MATRICES = ("lora_A", "lora_B")
_MAGNITUDE = "lora_magnitude_vector"


def lora_config(rank_map: RankMap, dropout: float = 0.0, encoder_decoder: bool = False) -> Any:
    """PEFT config naming every active module with its own rank and alpha."""
    from peft import LoraConfig

    active = rank_map.active()
    first = active[0]
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules=[m.module for m in active],
        rank_pattern={m.module: m.rank for m in active if m.rank != first.rank},
        alpha_pattern={m.module: m.alpha for m in active if m.alpha != first.alpha},
        lora_dropout=dropout,
        bias="none",
        task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
        use_rslora=rank_map.settings.get("variant") == "rslora",
        use_dora=rank_map.settings.get("variant") == "dora",
    )


def lora_layers(model: Any) -> dict[str, Any]:
    """LoRA layers of a PEFT model by the base model's module name."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(_SAVED): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def adaptable(model: Any, modules: list[LinearModule]) -> list[LinearModule]:
    """The modules to which PEFT attaches LoRA when they are named; the others are printed with PEFT's reason.

    PEFT refuses some (Mamba's out_proj, which its kernels read past the layer), and takes some names of
    mixtures of experts for those of fused expert tensors. What it does is tried, one module type at a time.
    """
    from peft import LoraConfig, get_peft_model

    reachable: set[str] = set()
    for kind in dict.fromkeys(m.type for m in modules):
        names = [m.module for m in modules if m.type == kind]
        reason = "PEFT takes the name for another one"
        try:
            wrapped = get_peft_model(model, LoraConfig(r=1, target_modules=names))
            reached = set(lora_layers(wrapped)) & set(names)
            model = wrapped.unload()
        except ValueError as error:
            reached, reason = set(), str(error).splitlines()[0]
        if len(reached) < len(names):
            warn(f"{kind}: {len(names) - len(reached)} matrices stay frozen without an adapter: {reason}")
        reachable |= reached
    return [m for m in modules if m.module in reachable]


def attach(
    model: Any,
    rank_map: RankMap,
    dropout: float = 0.0,
    start: dict[str, torch.Tensor] | None = None,
    gradient_init: dict[str, torch.Tensor] | None = None,
    cuda: bool | None = None,
) -> Any:
    """Wrap `model` with the map's adapters; groups use one A, one B, or one pair; `frozen` ones do not train.

    Adapters are float32. Their products are, too, but for a GPU that computes in bfloat16: there they are made in it.

    Args:
        model: the frozen base model.
        rank_map: which module gets an adapter of which rank.
        dropout: on the adapters' input.
        start: weights from an earlier round, `module.lora_A` (rank x in) and `module.lora_B` (out x rank).
        gradient_init: the first A (rank x in) of a module, or of a group by its first module; `module.lora_B` is the
            first B (out x rank) of a group that shares B.
        cuda: whether the model is for a GPU; None asks this machine.
    """
    from peft import get_peft_model

    config = lora_config(rank_map, dropout, model.config.is_encoder_decoder)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    layers = lora_layers(wrapped)
    with torch.no_grad():
        share_factors(wrapped, layers, rank_map)
        half = model.get_input_embeddings().weight.dtype == torch.bfloat16
        if half and (device() == "cuda" if cuda is None else cuda):
            keep_input_types(layers)
        for entry in rank_map.active():
            weights = _weights(layers[entry.module])
            a, b = (
                (gradient_init or {}).get(entry.module),
                (gradient_init or {}).get(f"{entry.module}.lora_B"),
            )
            if a is not None:
                weights["lora_A"][: len(a)].copy_(a)
            if b is not None:
                weights["lora_B"][:, : b.shape[1]].copy_(b)
            for name, weight in weights.items():
                if start and f"{entry.module}.{name}" in start:
                    weight.copy_(start[f"{entry.module}.{name}"])
    for entry in rank_map.active():
        if entry.tier == "frozen":
            for weight in _weights(layers[entry.module]).values():
                weight.requires_grad_(False)
    return wrapped


def _weights(layer: Any) -> dict[str, torch.nn.Parameter]:
    """Adapter parameters of a LoRA layer: A (rank x in), B (out x rank), and DoRA's magnitudes (out)."""
    weights = {name: getattr(layer, name)[_ADAPTER].weight for name in _MATRICES}
    if _ADAPTER in layer.lora_magnitude_vector:
        weights[_MAGNITUDE] = layer.lora_magnitude_vector[_ADAPTER].weight
    return weights


def parameter_groups(
    model: Any, rank_map: RankMap, learning_rate: float, lora_plus_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups, one per learning rate; a shared factor is in one group, once.

    Args:
        model: PEFT model.
        rank_map: its rank map, with each module's learning-rate scale.
        learning_rate: base rate, that of A.
        lora_plus_ratio: rate of B over that of A.
    """
    layers = lora_layers(model)
    grouped: dict[float, list[torch.nn.Parameter]] = {}
    seen: set[int] = set()
    for entry in rank_map.active():
        for name, weight in _weights(layers[entry.module]).items():
            if weight.requires_grad and id(weight) not in seen:
                seen.add(id(weight))
                rate = learning_rate * entry.lr_scale * (lora_plus_ratio if name == "lora_B" else 1.0)
                grouped.setdefault(round(rate, 12), []).append(weight)
    return [{"params": parameters, "lr": rate} for rate, parameters in sorted(grouped.items())]


def trainable_parameters(model: Any) -> int:
    """Distinct trainable numbers; what modules share counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all adapter weights: `module.lora_A` (rank x in), `module.lora_B` (out x rank), magnitudes."""
    return {
        f"{module}.{name}": weight.detach().float().cpu().clone()
        for module, layer in lora_layers(model).items()
        for name, weight in _weights(layer).items()
    }


def restore(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put what `adapter_weights` copied back."""
    with torch.no_grad():
        for module, layer in lora_layers(model).items():
            for name, weight in _weights(layer).items():
                weight.copy_(weights[f"{module}.{name}"])


def merged_weight(
    entry: ModuleRank, rank_map: RankMap, weights: dict[str, torch.Tensor], weight: torch.Tensor
) -> torch.Tensor:
    """W + scaling·B·A (out x in, float32); under DoRA its rows rescaled to the trained magnitudes."""
    delta = rank_map.scaling(entry) * (weights[f"{entry.module}.lora_B"] @ weights[f"{entry.module}.lora_A"])
    merged = weight.float() + delta
    magnitude = weights.get(f"{entry.module}.{_MAGNITUDE}")
    return merged if magnitude is None else merged * (magnitude / merged.norm(dim=1))[:, None]


def save(model: Any, folder: Path, base_model: str) -> None:
    """Write a standard PEFT adapter; every member of a group gets its own copy."""
    model.peft_config[_ADAPTER].base_model_name_or_path = base_model
    # Else PEFT asks the hub how many rows the base's embedding has, to keep one that was resized; ours never is.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)


def settle_scaling(folder: Path) -> None:
    """Rewrite a saved adapter so that `lora_alpha / r` is every module's scaling, where it is not yet.

    Servers read these two numbers and may pass over `alpha_pattern`, `rank_pattern` and `use_rslora`, which PEFT reads:
    what differs between modules is multiplied into B (out x rank). The product scaling·B·A stays.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    config, weights = LoraConfig.from_pretrained(folder), load_file(folder / WEIGHTS)
    scalings = {}
    for key in (key for key in weights if key.endswith(".lora_B.weight")):
        module, rank = key.removeprefix(_SAVED).removesuffix(".lora_B.weight"), weights[key].shape[1]
        alpha = config.alpha_pattern.get(module, config.lora_alpha)
        scalings[key] = alpha / (rank**0.5 if config.use_rslora else rank)
    if all(math.isclose(scaling, config.lora_alpha / config.r) for scaling in scalings.values()):
        return
    save_file(
        {key: weight * scalings.get(key, 1.0) for key, weight in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config.use_rslora, config.lora_alpha, config.alpha_pattern = False, config.r, dict(config.rank_pattern)
    config.save_pretrained(folder)


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a saved PEFT adapter under the names that `adapter_weights` uses."""
    from safetensors.torch import load_file

    return {
        key.removeprefix(_SAVED).removesuffix(".weight"): weight.float()
        for key, weight in load_file(folder / WEIGHTS).items()
    }


def with_adapter(model: Any, folder: Path) -> Any:
    """A plain or 4-bit model with a saved PEFT adapter on it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def merge(model: Any, folder: Path) -> Any:
    """A plain model with a saved PEFT adapter added to its weights.

    Raises:
        ValueError: the merged weights are not finite.
    """
    return with_adapter(model, folder).merge_and_unload(safe_merge=True)
