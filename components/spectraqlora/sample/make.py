"""Making the offline sample: tokenizer, pretrained model and fine-tuning rows, once per machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectraqlora.places import Place
from spectraqlora.runtime.cache import cache_folder
from spectraqlora.sample.world import corpus, people, questions

VERSION = 1
PEOPLE = 100
DOCUMENTS = 20_000
STEPS = 700
ROWS_PER_STEP = 16
TOKENS_PER_ROW = 64
LEARNING_RATE = 4e-3


def ensure_sample(cache: Path | None = None, progress: Callable[[int, int], None] | None = None) -> Path:
    """The sample's folder (`model/`, `data.jsonl`), made on first use in the user's cache."""
    root = cache or cache_folder()
    folder = root / f"sample-v{VERSION}"
    if not (folder / "data.jsonl").exists():
        root.mkdir(parents=True, exist_ok=True)
        make_sample(folder, progress=progress)
    return folder


def on_this_machine(place: Place) -> Place:
    """A place as it is; of the sample, its model's folder or its data's file, made on first use."""
    if place.kind != "sample":
        return place
    part = "model" if place.holds == "model" else "data.jsonl"
    return dataclasses.replace(place, kind="path", text=str(ensure_sample() / part))


def make_sample(folder: Path, seed: int = 42, progress: Callable[[int, int], None] | None = None) -> None:
    """Pretrain and write the sample; the folder appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".sample-", dir=folder.parent))
    try:
        world = people(seed, PEOPLE)
        documents = corpus(world, seed, DOCUMENTS)
        rows = questions(world, seed)
        tokenizer = _tokenizer(
            [*documents, *(f"Question: {r['question']}\nAnswer: {r['answer']}" for r in rows[:40])]
        )
        model = _pretrain(tokenizer, documents, seed, progress)
        model.save_pretrained(scratch / "model", safe_serialization=True)
        tokenizer.save_pretrained(scratch / "model")
        with open(scratch / "data.jsonl", "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        # No secret, and steps in containers may run as another user: safetensors and mkdtemp keep all others out.
        for path in (scratch, *scratch.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _pretrain(
    tokenizer: Any, documents: list[str], seed: int, progress: Callable[[int, int], None] | None
) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    stream: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    count = len(stream) // TOKENS_PER_ROW
    rows = torch.tensor(stream[: count * TOKENS_PER_ROW]).view(count, TOKENS_PER_ROW)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05
    )
    model.train()
    for step in range(STEPS):
        batch = rows[torch.randint(count, (ROWS_PER_STEP,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress and (step % 10 == 0 or step == STEPS - 1):
            progress(step + 1, STEPS)
    return model.eval()
