"""Speed of training and scoring with rows that share sequences (data.packing=rows), against padded rows.

    python -m tests.benchmarks.packing [--rows N] [--repeats N] [--width N --layers N]

Rows have lengths as GSM8K's have (log-normal, median 151 tokens, at most 512) and random tokens, of which the last
two thirds count. Both sides take the same batches of a Llama of random weights with LoRA on its linear layers, in turn;
a ratio is that of two neighbours in time. Tokens are the rows' own, padding is none of them.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

LOG_MEAN, LOG_DEVIATION, LONGEST = 5.02, 0.387, 512


def rows(count: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Rows of GSM8K's lengths."""
    from spectraqlora.artifacts import IGNORED

    choose = random.Random(0)
    made = []
    for _ in range(count):
        length = min(LONGEST, max(20, round(choose.lognormvariate(LOG_MEAN, LOG_DEVIATION))))
        ids = [choose.randrange(3, vocabulary) for _ in range(length)]
        made.append({"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    return made


def model(options: argparse.Namespace) -> Any:
    """A Llama with LoRA on every linear layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=options.width * 11 // 4,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            num_key_value_heads=max(1, options.width // 256),
            pad_token_id=0,
        )
    ).to(options.device)
    return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of processors."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rows", 64), ("repeats", 3), ("width", 768), ("layers", 4), ("vocabulary", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    import torch
    from spectraqlora.scoring.batches import Collator, attention_by_position
    from spectraqlora.scoring.head_loss import HeadLoss
    from spectraqlora.scoring.loss import score

    subject, data = model(options), rows(options.rows, options.vocabulary)
    tokens = sum(len(row["input_ids"]) for row in data)
    loss = HeadLoss(subject, Collator.of(subject.config)(data[:1]))

    def train(size: int, packing: bool) -> None:
        collate = Collator.of(subject.config, packing)
        subject.train()
        with loss.hidden_states(), attention_by_position(subject):
            for batch in collate.batches(data, size):
                labels = batch.pop("labels").to(options.device)
                outputs = subject(**{k: v.to(options.device) for k, v in batch.items()}, use_cache=False)
                loss(outputs, labels).backward()
                subject.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    def evaluate(size: int, packing: bool) -> None:
        score(subject, data, size, loss, packing)

    print("| work | rows per batch | padded, tokens/s | packed, tokens/s | ratio | by processor |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, work in (("training", train), ("scoring", evaluate)):
        for size in options.batch_sizes:
            work(size, True)
            sides = [
                [measured(functools.partial(work, size, packing)) for packing in (False, True)]
                for _ in range(options.repeats)
            ]
            speed = [tokens / statistics.median(pair[side][0] for pair in sides) for side in (0, 1)]
            ratios = [[pair[0][kind] / pair[1][kind] for pair in sides] for kind in (0, 1)]
            shown = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios]
            print(
                f"| {name} | {size} | {speed[0]:,.0f} | {speed[1]:,.0f} | {shown[0]} | {shown[1]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
