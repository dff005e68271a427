"""One round of training with transformers.Trainer: same data order for every method, best adapter kept."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spectraqlora import adapters
from spectraqlora.artifacts import GRADIENT_INIT, QuantizedModel, RankMap, TrainingLog
from spectraqlora.models import device, load_quantized, peak_memory_bytes
from spectraqlora.progress import Progress
from spectraqlora.rows import collate, load_rows
from spectraqlora.scoring import score
from spectraqlora.settings import EvaluateSettings, TrainSettings

FIXED_METHODS = ("qlora", "random", "sgm")
"""Methods whose rank map never moves: they spend the whole budget of all rounds in the first."""


def train(
    quantized: Path,
    data: Path,
    ranks_folder: Path,
    settings: TrainSettings,
    evaluation: EvaluateSettings,
    seed: int,
    rounds: int,
    output: Path,
    previous: Path | None = None,
) -> TrainingLog:
    """Train the map's adapters and write a PEFT adapter and `training.json` to `output`.

    Args:
        quantized: 4-bit model artifact.
        data: prepared data artifact.
        ranks_folder: rank map artifact, with SGM's first A beside it where there is one.
        settings: of training.
        evaluation: batch size of the evaluations during training.
        seed: of data order, dropout and fresh adapters.
        rounds: how many rounds the branch has in all.
        output: the adapter artifact.
        previous: the adapter carried over from the round before.
    """
    from safetensors.torch import load_file

    ranks = RankMap.read(ranks_folder)
    manifest = QuantizedModel.read(quantized)
    ranks.check_base(manifest.base_digest)
    if previous is not None and ranks.method in FIXED_METHODS:
        print(f"round {ranks.round}: {ranks.method} keeps its rank map, so nothing is left to train")
        shutil.copytree(previous, output, dirs_exist_ok=True)
        log = TrainingLog.read(previous).model_copy(
            update={
                "round": ranks.round,
                "train_seconds": 0.0,
                "train_tokens": 0,
                "loss_curve": [],
                "eval_curve": [],
            }
        )
        log.write(output)
        return log

    torch.manual_seed(seed)
    model, _ = load_quantized(quantized)
    init_file = ranks_folder / GRADIENT_INIT
    wrapped = adapters.attach(
        model,
        ranks,
        settings.lora_dropout,
        start=adapters.read_pairs(previous) if previous else None,
        gradient_init=load_file(init_file) if init_file.exists() and not previous else None,
    )
    steps = settings.max_steps * (rounds if ranks.method in FIXED_METHODS else 1)
    log = _fit(wrapped, ranks, data, settings, evaluation, seed, steps, keep_start=previous is not None)
    adapters.save(wrapped, output, manifest.source)
    log.write(output)
    return log


def _fit(
    model: Any,
    ranks: RankMap,
    data: Path,
    settings: TrainSettings,
    evaluation: EvaluateSettings,
    seed: int,
    steps: int,
    keep_start: bool,
) -> TrainingLog:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows, held_out = load_rows(data, "train"), load_rows(data, "eval")
    pad = model.config.pad_token_id or 0
    losses: list[tuple[int, float]] = []
    evals: list[tuple[int, float]] = []
    best: dict[str, Any] = {"loss": float("inf")}
    paused = 0.0
    every = max(1, steps // settings.evaluations)
    progress = Progress(f"{ranks.method} round {ranks.round}: training step", steps)

    def evaluate(step: int) -> None:
        nonlocal paused
        began = time.perf_counter()
        loss = score(model, held_out, evaluation.batch_size, pad).loss
        evals.append((step, loss))
        if loss < best["loss"]:
            best.update(loss=loss, weights=adapters.pairs(model))
        paused += time.perf_counter() - began

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0 or state.global_step == steps:
                evaluate(state.global_step)
            note = f"eval loss {evals[-1][1]:.3f}" if evals else ""
            progress(state.global_step, note)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                losses.append((state.global_step, float(logs["loss"])))

    recompute = settings.gradient_checkpointing == "on" or (
        settings.gradient_checkpointing == "auto" and device() == "cuda"
    )
    optimizer = torch.optim.AdamW(
        adapters.parameter_groups(model, ranks, settings.learning_rate), weight_decay=settings.weight_decay
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=settings.batch_size,
                gradient_accumulation_steps=settings.gradient_accumulation,
                learning_rate=settings.learning_rate,
                lr_scheduler_type=settings.schedule,
                warmup_steps=int(steps * settings.warmup_ratio),
                max_grad_norm=settings.max_grad_norm,
                gradient_checkpointing=recompute,
                gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
                seed=seed,
                data_seed=seed,
                logging_steps=max(1, steps // 100),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                include_num_input_tokens_seen="non_padding",
                use_cpu=device() == "cpu",
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=lambda part: collate(part, pad),
            optimizers=(optimizer, None),
            callbacks=[Watch()],
        )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        if keep_start:
            evaluate(0)
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
        paused = 0.0
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began - paused
    adapters.restore(model, best["weights"])
    tokens = int(trainer.state.num_input_tokens_seen)
    return TrainingLog(
        method=ranks.method,
        round=ranks.round,
        trainable_parameters=adapters.trainable_parameters(model),
        train_seconds=seconds,
        train_tokens=tokens,
        train_tokens_per_second=tokens / seconds,
        peak_memory_bytes=peak_memory_bytes(),
        best_eval_loss=best["loss"],
        loss_curve=losses,
        eval_curve=evals,
    )
