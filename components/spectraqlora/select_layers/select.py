"""The step's work: scores, gradients where the method or the signal needs them, rank map."""

from __future__ import annotations

import math
from pathlib import Path

from spectraqlora.artifacts import (
    GRADIENT_INIT,
    LinearModule,
    QuantizedModel,
    RankMap,
    Similarity,
    write_text,
)
from spectraqlora.selection import (
    Scores,
    check_rank,
    rank_map,
    task_scores,
    top_percent,
)
from spectraqlora.settings import SelectSettings
from spectraqlora.snr.table import read_table


def snr_scores(table_folder: Path) -> Scores:
    """Raw SNR with the calibrated value as tie-breaker; NaN is no candidate."""
    table = read_table(table_folder)
    return {
        row.module: (float(row.snr), float(row.calibrated) if math.isfinite(row.calibrated) else 0.0)
        for row in table.itertuples()
        if not math.isnan(row.snr)
    }


def select(
    method: str, quantized: Path, data: Path, table: Path, settings: SelectSettings, seed: int, output: Path
) -> RankMap:
    """Write `rank_map.json`, and for sgm `similarity.json` and the gradient initialisation."""
    manifest = QuantizedModel.read(quantized)
    modules = manifest.modules
    check_rank(modules, settings, (method,))
    scores = snr_scores(table)
    groups = None
    if method == "sgm" or (settings.signal == "task" and method in ("hybrid", "alors")):
        import torch
        from safetensors.torch import save_file

        from spectraqlora.models import load_quantized
        from spectraqlora.rows import batches, load_rows
        from spectraqlora.select_layers.gradients import sketch_gradients
        from spectraqlora.select_layers.grouping import group_by_similarity

        torch.manual_seed(seed)
        model, _ = load_quantized(quantized)
        rows = load_rows(data, "train").shuffle(seed=seed)
        few = batches(rows, 8, model.config.pad_token_id or 0, limit=settings.calibration_batches)
        candidates: list[LinearModule] = modules
        if settings.signal == "spectrum":
            chosen = top_percent(modules, scores, settings.percent)
            candidates = [m for m in modules if m.module in chosen]
        sketches = sketch_gradients(model, candidates, few, settings.sketch_size, seed)
        if settings.signal == "task":
            scores = task_scores(modules, sketches, settings.rank)
        if method == "sgm":
            chosen = top_percent(modules, scores, settings.percent)
            candidates = [m for m in candidates if m.module in chosen and m.module in sketches]
            if candidates:
                similarity: Similarity = group_by_similarity(candidates, sketches, settings.similarity)
                similarity.write(output)
                groups = similarity.groups
                if settings.gradient_init:
                    starts = {}
                    for index, group in enumerate(groups):
                        mean = torch.stack([sketches[name].range_sketch for name in group]).mean(0)
                        directions = torch.linalg.svd(mean, full_matrices=False)[0][:, : settings.rank].T
                        # Row norm of a Kaiming-uniform A, so that the learning rate means the same.
                        starts[str(index)] = (directions / 3**0.5).contiguous()
                    save_file(starts, output / GRADIENT_INIT)
    result = rank_map(method, modules, scores, settings, manifest.base_digest, seed, groups)
    result.write(output)
    active = result.active()
    print(f"{method}: {len(active)} of {len(modules)} matrices get adapters")
    write_text(output / "selected.txt", "\n".join(m.module for m in active) + "\n")
    return result
