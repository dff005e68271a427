"""What computing x·Aᵀ once for the modules that share A saves of a training step.

    python -m tests.benchmarks.shared_products --base-model DIR [--turns N]

Three adapters of one rank on q, k, v, gate and up of every block of the 4-bit model: factors of their own; A shared in a
block, each module computing x·Aᵀ for itself; A shared and x·Aᵀ computed once, as sgm trains. Steps (forward, backward,
AdamW) are taken in turns, and timed by the processor seconds of this process, so that others on the machine hardly
count; the median of each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def _model(quantized: Path, rank: int, shared: bool, once: bool) -> Any:
    from spectraqlora.artifacts import FourBitModel
    from spectraqlora.methods.catalogue import method
    from spectraqlora.models import adapters
    from spectraqlora.models.loading import load_four_bit
    from spectraqlora.models.modules import residual_width
    from spectraqlora.models.sharing import SharedProjection
    from spectraqlora.settings import SelectSettings

    modules = FourBitModel.read(quantized).modules
    rank_map = method("qlora").first_ranks(modules, {}, SelectSettings(rank=rank), 1, {})
    width, groups = residual_width(modules), dict[str, int]()
    readers = [m for m in modules if m.in_features == width and not m.type.endswith("o_proj")]
    for info in readers:
        part = f"{info.layer}.{info.type.rpartition('.')[0]}"
        group = groups.setdefault(part, len(groups))
        entry = next(m for m in rank_map.modules if m.module == info.module)
        entry.shared, entry.group = ("A", group) if shared else ("pair", None)
    names = {m.module for m in readers}
    rank_map.modules = [
        m if m.module in names else m.model_copy(update={"rank": 0}) for m in rank_map.modules
    ]
    model = adapters.attach(load_four_bit(quantized)[0], rank_map)
    if shared and not once:
        for layer in adapters.lora_layers(model).values():
            projection = layer.lora_A["default"]
            assert isinstance(projection, SharedProjection)
            plain = torch.nn.Linear(projection.in_features, rank, bias=False, device="meta")
            plain.weight = projection.weight
            layer.lora_A["default"], layer.cast_input_dtype_enabled = plain, True
    return model.train()


def main() -> None:
    from spectraqlora.settings import ModelSettings
    from spectraqlora.steps.quantize_load.quantize import quantize

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--compute-dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        four_bit, outline = Path(scratch) / "four_bit", Path(scratch) / "outline"
        for folder in (four_bit, outline):
            folder.mkdir()
        settings = ModelSettings.model_validate(
            {"base_model": options.base_model, "compute_dtype": options.compute_dtype}
        )
        quantize(settings, four_bit, outline)
        arms = {
            "own factors": _model(four_bit, options.rank, shared=False, once=False),
            "A shared, a product each": _model(four_bit, options.rank, shared=True, once=False),
            "A shared, one product": _model(four_bit, options.rank, shared=True, once=True),
        }
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for name, model in arms.items()
    }
    vocabulary = next(iter(arms.values())).get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (options.rows, options.tokens))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(options.turns + 1):
        for name, model in arms.items():
            began = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if turn:
                seconds[name].append(time.process_time() - began)
    first = statistics.median(seconds["own factors"])
    print("| adapters | trained parameters | processor seconds a step | |\n| --- | --- | --- | --- |")
    for name, model in arms.items():
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        middle = statistics.median(seconds[name])
        print(f"| {name} | {count:,} | {middle:.3f} | {middle / first - 1:+.1%} |")


if __name__ == "__main__":
    main()
