"""One round of training with transformers.Trainer: same data order for every method, best adapter kept."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spectraqlora.artifacts import GRADIENT_INIT, FourBitModel, RankMap, TrainingLog
from spectraqlora.errors import Stopped
from spectraqlora.methods.catalogue import method
from spectraqlora.models import adapters
from spectraqlora.models.activations import every_nth, recompute_blocks, recompute_elementwise
from spectraqlora.models.hardware import device, peak_memory_bytes
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.optimizers import check_optimizer, make_optimizer
from spectraqlora.runtime.console import Progress
from spectraqlora.runtime.deferred_signals import deferred_signals
from spectraqlora.scoring.batches import Collator, load_rows, order
from spectraqlora.scoring.head_loss import HeadLoss
from spectraqlora.settings import CheckpointSettings, EvaluateSettings, TrainSettings
from spectraqlora.steps.train import distributed
from spectraqlora.steps.train.checkpoints import Checkpoints, identity
from spectraqlora.steps.train.state import Course, capture, restore, restore_random

OnMetric = Callable[[str, int, float], None]


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
    checkpoint: CheckpointSettings | None = None,
    start: Path | None = None,
    on_metric: OnMetric = lambda name, step, value: None,
) -> TrainingLog:
    """Train the map's adapters and write a PEFT adapter and `training.json` to `output`.

    Goes on from the newest checkpoint of the same inputs, where there is one.

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
        checkpoint: where checkpoints are; none are written where it names no place.
        start: an adapter of the same rank map to start the first round from.
        on_metric: called with name, step of this round and value while training goes on.

    Raises:
        InputError: unusable inputs, or a checkpoint address that cannot be read.
        Stopped: by SIGTERM or SIGINT, after a checkpoint.
    """
    from safetensors.torch import load_file

    ranks = RankMap.read(ranks_folder)
    manifest = FourBitModel.read(quantized)
    ranks.check_base(manifest.base_digest)
    if previous is not None and nothing_left(ranks):
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

    check_optimizer(settings.optimizer)
    torch.manual_seed(seed)
    sharded = distributed.world_size() > 1 and settings.parallel == "fsdp"
    model, _ = load_four_bit(quantized, "cpu" if sharded else "")
    init_file = ranks_folder / GRADIENT_INIT
    begin = previous or start
    wrapped = adapters.attach(
        model,
        ranks,
        settings.lora_dropout,
        start=adapters.read_adapter_weights(begin) if begin else None,
        gradient_init=load_file(init_file) if init_file.exists() and not begin else None,
    )
    if sharded:
        distributed.shard_base(wrapped)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = None
        if checkpoint is not None and (checkpoint.folder or checkpoint.destination):
            name = identity(quantized, data, ranks_folder, begin, settings, evaluation, seed, rounds)
            checkpoints = Checkpoints(checkpoint, name, Path(scratch))
        part = span(ranks, settings, rounds)
        log = fit(
            wrapped,
            ranks,
            data,
            settings,
            evaluation,
            seed,
            part,
            checkpoints=checkpoints,
            on_metric=on_metric,
            begun=bool(begin),
        )
    if distributed.is_main():
        adapters.save(wrapped, output, manifest.source)
        log.write(output)
    return log


def nothing_left(ranks: RankMap) -> bool:
    """Whether a round has nothing to train: the method spent the budget of all rounds in the first."""
    return ranks.round > 1 and not method(ranks.method).moves


@dataclass(frozen=True)
class Span:
    """The optimizer steps of one round within its branch's whole budget."""

    start: int
    stop: int
    total: int

    @property
    def steps(self) -> int:
        return self.stop - self.start


def span(ranks: RankMap, settings: TrainSettings, rounds: int) -> Span:
    """A round's steps: all at once where the rank map never moves, else its share of one schedule.

    The learning-rate schedule and the reading order run over the whole branch, so that branches differ in
    what they train and in nothing else.
    """
    total = settings.max_steps * rounds
    if not method(ranks.method).moves:
        return Span(0, total, total)
    return Span((ranks.round - 1) * settings.max_steps, ranks.round * settings.max_steps, total)


def _schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, part: Span) -> Any:
    """The branch's learning-rate schedule, from this round's first step on."""
    from transformers import get_scheduler

    whole = get_scheduler(settings.schedule, optimizer, int(part.total * settings.warmup_ratio), part.total)
    at = whole.lr_lambdas[0]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: at(step + part.start))


def fit(
    model: Any,
    ranks: RankMap,
    data: Path,
    settings: TrainSettings,
    evaluation: EvaluateSettings,
    seed: int,
    part: Span,
    on_step: Callable[[int], None] = lambda step: None,
    checkpoints: Checkpoints | None = None,
    on_metric: OnMetric = lambda name, step, value: None,
    begun: bool = False,
) -> TrainingLog:
    """Train a PEFT model's adapters in place and leave the best ones in it.

    Args:
        model: PEFT model with the rank map's adapters.
        ranks: the rank map.
        data: prepared data artifact.
        settings: of training.
        evaluation: batch size of the evaluations.
        seed: of reading order and dropout.
        part: which steps of the branch's schedule to train.
        on_step: called after every optimizer step with its number in this round.
        checkpoints: where to go on from, and where to keep the state at intervals and when stopped.
        on_metric: called with name, step of this round and value: the points of the log's curves.
        begun: whether the adapters are trained already, so that none of these steps may be the best.

    Raises:
        Stopped: by SIGTERM or SIGINT, after a checkpoint.
    """
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    rows, held_out = load_rows(data, "train"), load_rows(data, "held_out")
    collate = Collator.of(model.config)
    pass_rows, passes = distributed.share(settings, distributed.world_size())
    per_step = settings.batch_size * settings.gradient_accumulation
    places = order(len(rows), seed, part.start * per_step, part.stop * per_step)
    groups = adapters.parameter_groups(model, ranks, settings.learning_rate, settings.lora_plus_ratio)
    optimizer = make_optimizer(settings.optimizer, groups, settings.weight_decay)
    schedule = _schedule(optimizer, settings, part)
    paused = 0.0
    every = max(1, part.steps // settings.evaluations)
    progress = Progress(f"{ranks.method} round {ranks.round}: training step", part.steps)
    probe = {k: v.to(device()) for k, v in collate([rows[places[0]]]).items()}
    loss = HeadLoss(model, probe)
    found = checkpoints.newest() if checkpoints else None
    course = restore(found, model, optimizer, schedule) if found else Course()
    # Trainer trains what is left as if it were all: its own way back would read pickles.
    first = course.step

    def evaluate(step: int) -> None:
        nonlocal paused
        began = time.perf_counter()
        found = distributed.mean_loss(model, held_out, evaluation.batch_size, loss)
        course.evals.append((step, found))
        on_metric("eval_loss_curve", step, found)
        if found < course.best_loss:
            course.best_loss, course.best = found, adapters.adapter_weights(model)
        paused += time.perf_counter() - began

    def keep(checkpoints: Checkpoints, seconds: float, tokens: int) -> None:
        nonlocal paused
        began = time.perf_counter()
        course.peak_memory_bytes = max(course.peak_memory_bytes, peak_memory_bytes())
        so_far = replace(course, seconds=course.seconds + seconds, tokens=course.tokens + tokens)
        checkpoints.write(capture(model, optimizer, schedule, so_far))
        paused += time.perf_counter() - began

    class Watch(TrainerCallback):
        resumed = found is not None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.resumed and found is not None:
                restore_random(found)
                self.resumed = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            course.step = first + state.global_step
            if course.step % every == 0 or course.step == part.steps:
                evaluate(course.step)
            note = f"eval loss {course.evals[-1][1]:.3f}" if course.evals else ""
            progress(course.step, note)
            on_step(course.step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            course.losses.append(float(logs["loss"]))
            if point := course.last_point(part.steps):
                on_metric("train_loss", *point)
            if checkpoints is None:
                return
            # Several processes act on the same step: on the first one's clock, and on a signal to any.
            wanted = course.step == part.steps or checkpoints.due(course.step)
            signal, due = divmod(distributed.highest(2 * stopped_by() + wanted), 2)
            if signal or due:
                keep(checkpoints, time.perf_counter() - began - paused, int(state.num_input_tokens_seen))
            if signal:
                where = f"stopped after step {course.step} of {part.steps}"
                raise Stopped(signal, f"{where}; a retry goes on from there")

    every_block = every_nth(settings.gradient_checkpointing, device() == "cuda")
    if every_block:
        recompute_blocks(model, every_block)
    if begun and not found:
        evaluate(0)
    if first < part.steps:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = distributed.trainer_class()(
                model=model,
                args=TrainingArguments(
                    output_dir=scratch,
                    max_steps=part.steps - first,
                    per_device_train_batch_size=pass_rows,
                    gradient_accumulation_steps=passes,
                    max_grad_norm=settings.max_grad_norm,
                    seed=seed,
                    data_seed=seed,
                    train_sampling_strategy="sequential",
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    remove_unused_columns=False,
                    include_num_input_tokens_seen="non_padding",
                    use_cpu=device() == "cpu",
                    dataloader_pin_memory=False,
                ),
                train_dataset=rows.select(places[first * per_step :]),
                data_collator=collate,
                compute_loss_func=loss,
                optimizers=(optimizer, schedule),
                callbacks=[Watch()],
            )
            trainer.remove_callback(PrinterCallback)
            if device() == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with (
                loss.hidden_states(),
                recompute_elementwise(),
                deferred_signals() if checkpoints else nullcontext(lambda: 0) as stopped_by,
            ):
                paused = 0.0
                began = time.perf_counter()
                trainer.train()
                course.seconds += time.perf_counter() - began - paused
        course.tokens += int(trainer.state.num_input_tokens_seen)
    adapters.restore(model, course.best)
    return TrainingLog(
        method=ranks.method,
        round=ranks.round,
        trainable_parameters=adapters.trainable_parameters(model),
        train_seconds=course.seconds,
        train_tokens=course.tokens,
        train_tokens_per_second=course.tokens / course.seconds,
        peak_memory_bytes=distributed.highest(max(course.peak_memory_bytes, peak_memory_bytes())),
        processes=distributed.world_size(),
        best_eval_loss=course.best_loss,
        loss_curve=course.curve(),
        eval_curve=course.evals,
    )
