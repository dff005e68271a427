"""What the training part needs and no card: base checkpoints, rank maps, and the memory plan's numbers.

Runs on the CPU beside the parts before it. The complete model's shards serve the smaller one too.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from spectraqlora.artifacts import ModuleRank, RankMap
from spectraqlora.planning.shape import ModelShape
from spectraqlora.planning.steps import step_memory
from spectraqlora.planning.training import surrogate_map, training
from spectraqlora.sample import make, world
from spectraqlora.settings import Settings, parse

from tests.gpu.record import Part, part
from tests.gpu.shapes import Sizes, sizes

SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora": ("qlora", {}),
    "hybrid-25": ("hybrid", {"percent": 25}),
    "hybrid-50": ("hybrid", {"percent": 50}),
    "alors": ("alors", {}),
    "sgm": ("sgm", {}),
}
"""Ours: method and what its `select` section changes."""
READY, FAILED = "ready", "prepare-failed"
"""File in a stage's folder once checkpoint and rank maps are complete; file in the work folder if they never will."""


def write_checkpoints(work: Path, chosen: Sizes) -> None:
    """A base model of random bfloat16 weights for each stage; a matrix is drawn once and stands in every layer."""
    complete = work / "complete" / "base"
    complete.mkdir(parents=True)
    torch.manual_seed(0)
    shape = chosen.model
    drawn = [(0.02 * torch.randn(size)).bfloat16() for _, size in shape.matrices(0)]
    norm = torch.ones(shape.hidden, dtype=torch.bfloat16)
    shards: dict[str, list[str]] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, complete / name, metadata={"format": "pt"})
        shards[name] = list(tensors)

    embeddings, head = ((0.02 * torch.randn(shape.vocabulary, shape.hidden)).bfloat16() for _ in range(2))
    shard(
        "outside.safetensors",
        {"model.embed_tokens.weight": embeddings, "lm_head.weight": head, "model.norm.weight": norm},
    )
    for layer in range(shape.layers):
        names = [name for name, _ in shape.matrices(layer)]
        norms = [f"model.layers.{layer}.{n}_layernorm.weight" for n in ("input", "post_attention")]
        tensors = dict(zip(names, drawn, strict=True)) | {name: norm.clone() for name in norms}
        shard(f"layer-{layer:03}.safetensors", tensors)
    tokenizer = make._tokenizer(world.corpus(world.people(0, 12), 0, 300))
    for name, stage in chosen.stages.items():
        folder = work / name / "base"
        folder.mkdir(parents=True, exist_ok=True)
        of_stage = [f"layer-{layer:03}.safetensors" for layer in range(stage.layers)] + [
            "outside.safetensors"
        ]
        for file in of_stage:
            if not (folder / file).exists():
                os.link(complete / file, folder / file)
        where = {tensor: file for file in of_stage for tensor in shards[file]}
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = stage.config()
        config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def settings(chosen: Sizes, side: str, batch: int = 1) -> Settings:
    """Of a run that trains as the training part does."""
    method, select = SIDES[side]
    return parse(
        {
            "methods": method,
            "select": select,
            "train": {"batch_size": batch},
            "data": {"max_length": chosen.tokens, "pack": True},
        }
    )


def write_rank_maps(work: Path, stage: str, shape: ModelShape, chosen: Sizes) -> None:
    """The rank maps that the plan itself plans with; the first layer has an adapter in each."""
    for side, (method, _) in SIDES.items():
        folder = work / stage / "rank_map" / side
        folder.mkdir(parents=True)
        ranks = surrogate_map(method, shape, settings(chosen, side))
        (in_pairs(ranks) if method == "sgm" else ranks).write(folder)


def in_pairs(ranks: RankMap) -> RankMap:
    """The map with every two modules of a type sharing one adapter; the plan takes one for each."""
    entries: list[ModuleRank] = []
    seen: Counter[str] = Counter()
    types = {kind: index for index, kind in enumerate(dict.fromkeys(m.type for m in ranks.modules))}
    for entry in ranks.modules:
        if entry.rank:
            group = len(types) * (seen[entry.type] // 2) + types[entry.type]
            seen[entry.type] += 1
            entry = entry.model_copy(update={"group": group})
        entries.append(entry)
    return ranks.model_copy(update={"modules": entries})


def planned(shape: ModelShape, side: str, batch: int, chosen: Sizes, cuda: bool) -> dict[str, int]:
    """The plan's parts and total of one training, bytes."""
    own = settings(chosen, side, batch)
    memory = training(shape, surrogate_map(SIDES[side][0], shape, own), own, cuda)
    return {**vars(memory), "total": memory.total}


def wait_for(name: str, given: Part, spare: float = 0.0) -> None:
    """Until a stage's checkpoint and rank maps are there, or only `spare` seconds are left.

    Raises:
        SystemExit: they never will be, or not in time.
    """
    while not (given.work / name / READY).exists():
        if given.left() < spare or (given.work / FAILED).exists():
            raise SystemExit(f"the checkpoint of the model {name} was not prepared; see prepare.log")
        time.sleep(0.2)


def run(given: Part) -> None:
    chosen = sizes(given.small)
    # The machine's card is hidden from this process; the plan is the card's all the same.
    cuda = os.environ["SPECTRAQLORA_CHECK_DEVICE"] == "cuda"
    write_checkpoints(given.work, chosen)
    shapes = {
        stage: ModelShape(model.config(), "bfloat16" if cuda else "float32")
        for stage, model in chosen.stages.items()
    }
    for stage, shape in shapes.items():
        write_rank_maps(given.work, stage, shape, chosen)
        (given.work / stage / READY).touch()
    for stage, shape in shapes.items():
        quantizing = step_memory(shape, settings(chosen, "qlora"), cuda, "quantize-load", "")
        given.record.add("quantize", {"stage": stage, "total": quantizing.device})
        for batch in chosen.batches:
            for side in SIDES:
                parts = planned(shape, side, batch, chosen, cuda)
                given.record.add("plans", {"stage": stage, "side": side, "batch": batch, **parts})


if __name__ == "__main__":
    with part(__doc__) as given:
        try:
            run(given)
        except BaseException:
            (given.work / FAILED).touch()
            raise
