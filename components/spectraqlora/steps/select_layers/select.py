"""The step's work: scores, gradients where the method or the signal needs them, rank map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spectraqlora.artifacts import GRADIENT_INIT, FourBitModel, LinearModule, RankMap
from spectraqlora.files import write_text
from spectraqlora.methods.ranks import check_rank, rank_map, top_percent
from spectraqlora.settings import SelectSettings
from spectraqlora.signals.scores import calibration_sketches, module_scores
from spectraqlora.snr.table import read_table

if TYPE_CHECKING:
    from spectraqlora.signals.gradients import GradientSketch


def select(
    method: str, quantized: Path, data: Path, table: Path, settings: SelectSettings, seed: int, output: Path
) -> RankMap:
    """Write `rank_map.json`, and for sgm `similarity.json` and the gradient initialisation."""
    manifest = FourBitModel.read(quantized)
    modules = manifest.modules
    check_rank(modules, settings, (method,))
    snr = read_table(table)
    sketches: dict[str, GradientSketch] = {}
    signal = settings.needs_gradients and method in ("hybrid", "alors")
    if method == "sgm" or signal or settings.gradient_init == "on":
        import torch

        from spectraqlora.models.loading import load_four_bit

        candidates = modules
        if method == "sgm" and not settings.needs_gradients:
            scores = module_scores(settings, modules, snr, {})
            chosen = top_percent(modules, scores, settings.percent, settings.scope)
            candidates = [m for m in modules if m.module in chosen]
        torch.manual_seed(seed)
        model, _ = load_four_bit(quantized)
        sketches = calibration_sketches(model, candidates, data, settings, seed)
    scores = module_scores(settings, modules, snr, sketches) if method in ("hybrid", "alors", "sgm") else {}
    groups = None
    if method == "sgm":
        chosen = top_percent(modules, scores, settings.percent, settings.scope)
        groups = _groups(
            [m for m in modules if m.module in chosen & sketches.keys()], sketches, settings, output
        )
    result = rank_map(method, modules, scores, settings, manifest.base_digest, seed, groups)
    if sketches and settings.gradient_init != "off":
        _write_starts(sketches, result, output)
    result.write(output)
    active = result.active()
    print(f"{method}: {len(active)} of {len(modules)} matrices get adapters")
    write_text(output / "selected.txt", "\n".join(m.module for m in active) + "\n")
    return result


def _groups(
    candidates: list[LinearModule],
    sketches: dict[str, GradientSketch],
    settings: SelectSettings,
    output: Path,
) -> list[list[str]]:
    from spectraqlora.methods.grouping import group_by_similarity

    if not candidates:
        return []
    similarity = group_by_similarity(candidates, sketches, settings.similarity)
    similarity.write(output)
    return similarity.groups


def _write_starts(sketches: dict[str, GradientSketch], ranks: RankMap, output: Path) -> None:
    """The first A of every module, or of a group by its first one: leading directions of the mean gradient."""
    import torch
    from safetensors.torch import save_file

    sharing: dict[str | int, list[str]] = {}
    for entry in ranks.active():
        sharing.setdefault(entry.module if entry.group is None else entry.group, []).append(entry.module)
    rank_of = {m.module: m.rank for m in ranks.active()}
    starts = {}
    for members in sharing.values():
        mean = torch.stack([sketches[name].range_sketch for name in members]).mean(0)
        directions = torch.linalg.svd(mean, full_matrices=False)[0][:, : rank_of[members[0]]].T
        # Row norm of a Kaiming-uniform A, so that the learning rate means the same.
        starts[members[0]] = (directions / 3**0.5).contiguous()
    save_file(starts, output / GRADIENT_INIT)
