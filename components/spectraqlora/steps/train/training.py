"""One round of training with transformers.Trainer: same data order for every method, best adapter kept.

Read `train` first, then `fit`; what happens between two optimizer steps is in `between_steps`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from spectraqlora.artifacts import GRADIENT_INIT, FourBitModel, PreparedRows, RankMap, TrainingLog
from spectraqlora.methods.catalogue import method
from spectraqlora.models import adapters
from spectraqlora.models.activations import every_nth, recompute_blocks, recompute_elementwise
from spectraqlora.models.hardware import device, peak_memory_bytes
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.optimizers import check_optimizer, make_optimizer
from spectraqlora.runtime.deferred_signals import deferred_signals
from spectraqlora.runtime.images import step_image
from spectraqlora.scoring.batches import Collator, attention_by_position, load_rows, order
from spectraqlora.scoring.head_loss import HeadLoss
from spectraqlora.steps.train import distributed
from spectraqlora.steps.train.between_steps import BetweenSteps, OnMetric, check_finite
from spectraqlora.steps.train.checkpoints import Checkpoints, identity
from spectraqlora.steps.train.request import TrainRequest
from spectraqlora.steps.train.schedule import learning_rates, span
from spectraqlora.steps.train.state import (
    Snapshot,
    Tensors,
    TrainingProgress,
    capture,
    check_fits,
    random_state,
    restore,
)


def train(request: TrainRequest, on_metric: OnMetric = lambda name, step, value: None) -> TrainingLog:
    """Train the map's adapters and write a PEFT adapter and `training.json` to the request's output.

    Resumes from the newest checkpoint of the same inputs, where there is one.

    Args:
        request: what to train, from what, and where the adapter goes.
        on_metric: called with name, step of this round and value: the points of the log's curves.

    Raises:
        InputError: unusable inputs, a checkpoint address that cannot be read, or a loss that is not finite any more.
        Stopped: by SIGTERM or SIGINT, after a checkpoint.
    """
    rank_map = RankMap.read(request.inputs.rank_map)
    base = FourBitModel.read(request.inputs.four_bit)
    rank_map.check_base(base.base_digest)
    check_optimizer(request.train.optimizer)
    torch.manual_seed(request.seed)
    model = _adapted_model(request, rank_map)
    with tempfile.TemporaryDirectory() as scratch:
        log = fit(model, rank_map, request, _checkpoints(request, Path(scratch)), on_metric)
    if distributed.is_main():
        adapters.save(model, request.output, base.source)
        log.write(request.output)
    return log


def _adapted_model(request: TrainRequest, rank_map: RankMap) -> Any:
    """The 4-bit model with its adapters, on this process's device; under FSDP its blocks are sharded."""
    from safetensors.torch import load_file

    start, gradient_init = request.inputs.start, request.inputs.rank_map / GRADIENT_INIT
    sharded = distributed.world_size() > 1 and request.train.parallel == "fsdp"
    model, _ = load_four_bit(request.inputs.four_bit, "cpu" if sharded else "")
    wrapped = adapters.attach(
        model,
        rank_map,
        request.train.lora_dropout,
        start=adapters.read_adapter_weights(start) if start else None,
        gradient_init=load_file(gradient_init) if gradient_init.exists() and not start else None,
    )
    if sharded:
        distributed.shard_base(wrapped)
    return wrapped


def _checkpoints(request: TrainRequest, scratch: Path) -> Checkpoints | None:
    """The training's checkpoints where the settings name a place for them."""
    if not (request.checkpoint.folder or request.checkpoint.destination):
        return None
    return Checkpoints(request.checkpoint, identity(request), scratch)


def fit(
    model: Any,
    rank_map: RankMap,
    request: TrainRequest,
    checkpoints: Checkpoints | None = None,
    on_metric: OnMetric = lambda name, step, value: None,
) -> TrainingLog:
    """Train a PEFT model's adapters in place and leave the best ones in it.

    Args:
        model: PEFT model with the rank map's adapters.
        rank_map: the rank map.
        request: rows, settings and seed; whether its adapters are trained already.
        checkpoints: where to resume from, and where to keep the state at intervals and when stopped.
        on_metric: called with name, step of this round and value: the points of the log's curves.

    Raises:
        Stopped: by SIGTERM or SIGINT, after a checkpoint.
    """
    settings, steps = request.train, span(rank_map, request.train.max_steps, request.rounds)
    rows, held_out = load_rows(request.inputs.rows, "train"), load_rows(request.inputs.rows, "held_out")
    packing = PreparedRows.read(request.inputs.rows).shared_sequences
    rows_per_step = settings.batch_size * settings.gradient_accumulation
    places = order(len(rows), request.seed, steps.start * rows_per_step, steps.stop * rows_per_step)
    groups = adapters.parameter_groups(model, rank_map, settings.learning_rate, settings.lora_plus_ratio)
    optimizer = make_optimizer(settings.optimizer, groups, settings.weight_decay)
    schedule = learning_rates(optimizer, settings, steps)
    loss = HeadLoss(model, _on_device(Collator.of(model.config)([rows[places[0]]])))

    kept = functools.partial(capture, model, optimizer, schedule)
    snapshot = _newest(checkpoints, model, optimizer, kept) if checkpoints else None
    progress = restore(snapshot, model, optimizer, schedule) if snapshot else TrainingProgress()
    recomputing = device() == "cuda" or method(rank_map.method).recomputes
    if every := every_nth(settings.gradient_checkpointing, recomputing):
        recompute_blocks(model, every)

    def evaluate() -> None:
        """Score the held-out rows; the adapters are kept where no loss was lower."""
        mean = distributed.mean_loss(model, held_out, request.evaluate.batch_size, loss, packing)
        check_finite("held-out loss", mean, progress.step, steps.steps, settings.learning_rate)
        progress.evals.append((progress.step, mean))
        on_metric("eval_loss_curve", progress.step, mean)
        if mean < progress.best_loss:
            progress.best_loss, progress.best = mean, adapters.adapter_weights(model)

    if request.inputs.start and not snapshot:
        evaluate()  # Adapters that are trained already may be better than after any step of this round.
    if progress.step < steps.steps:
        with (
            tempfile.TemporaryDirectory() as scratch,
            loss.hidden_states(),
            attention_by_position(model),
            recompute_elementwise(),
            deferred_signals() if checkpoints else nullcontext(lambda: 0) as signal_received,
        ):
            between_steps = BetweenSteps(
                progress,
                steps.steps,
                settings.evaluations,
                evaluate,
                kept,
                f"{rank_map.method} round {rank_map.round}: training step",
                on_metric,
                settings.learning_rate,
                checkpoints,
                signal_received,
                snapshot,
            )
            # Trainer trains what is left as if it were all: its own way to resume would read pickles.
            trainer = distributed.trainer_class()(
                model=model,
                args=_arguments(request, steps.steps - progress.step, scratch),
                train_dataset=rows.select(places[progress.step * rows_per_step :]),
                data_collator=Collator.of(model.config, packing),
                compute_loss_func=loss,
                optimizers=(optimizer, schedule),
                callbacks=[between_steps],
            )
            _train_silently(trainer)
    adapters.restore(model, progress.best)
    return _log(request, rank_map, adapters.trainable_parameters(model), progress)


def _newest(
    checkpoints: Checkpoints,
    model: Any,
    optimizer: Any,
    kept: Callable[[TrainingProgress, Tensors], Snapshot],
) -> Snapshot | None:
    """The newest checkpoint that this training can take up."""
    at_start = kept(TrainingProgress(best=adapters.adapter_weights(model)), random_state())
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    return checkpoints.newest(functools.partial(check_fits, own=at_start, shapes=shapes))


def _on_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def _arguments(request: TrainRequest, steps: int, scratch: str) -> Any:
    """What `transformers.Trainer` goes by: rows in the order given, every loss logged, nothing written."""
    from transformers import TrainingArguments

    rows, passes = distributed.split_batch(request.train, distributed.world_size())
    return TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=passes,
        max_grad_norm=request.train.max_grad_norm,
        seed=request.seed,
        data_seed=request.seed,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,  # It would show a loss that is NaN as the mean of those before.
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        use_cpu=device() == "cpu",
        dataloader_pin_memory=False,
    )


def _train_silently(trainer: Any) -> None:
    """Train, with nobody but our own callback printing."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()


def _log(
    request: TrainRequest, rank_map: RankMap, trainable_parameters: int, progress: TrainingProgress
) -> TrainingLog:
    return TrainingLog(
        method=rank_map.method,
        round=rank_map.round,
        settings=request.train.model_dump(mode="json"),
        trainable_parameters=trainable_parameters,
        train_seconds=progress.seconds,
        train_tokens=progress.tokens,
        train_tokens_per_second=progress.tokens / progress.seconds,
        peak_memory_bytes=distributed.all_max(max(progress.peak_memory_bytes, peak_memory_bytes())),
        processes=distributed.world_size(),
        seed=request.seed,
        image=step_image(),
        best_eval_loss=progress.best_loss,
        loss_curve=progress.curve(),
        eval_curve=progress.evals,
    )
