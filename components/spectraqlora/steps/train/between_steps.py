"""What happens between the optimizer steps of a training: evaluations, curves, checkpoints, the end on a signal."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from spectraqlora.errors import InputError, Stopped
from spectraqlora.models.hardware import peak_memory_bytes
from spectraqlora.runtime.console import Progress
from spectraqlora.runtime.threads import bound_threads
from spectraqlora.steps.train import distributed
from spectraqlora.steps.train.checkpoints import Checkpoints
from spectraqlora.steps.train.state import Snapshot, Tensors, TrainingProgress, random_state, restore_random

OnMetric = Callable[[str, int, float], None]
"""Called with a curve's name, a step of the round and its value."""


class WorkClock:
    """Seconds spent training since `start`, pauses left out."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from now on, without pauses so far."""
        self._began, self._paused = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the start, without the pauses that have ended."""
        return time.perf_counter() - self._began - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, time does not count."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began


def check_finite(what: str, value: float, step: int, steps: int, learning_rate: float) -> None:
    """Refuse to train on once a number is not finite; checkpoints from before stay.

    Raises:
        InputError: the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise InputError(
            "train.learning_rate",
            learning_rate,
            f"a rate at which training stays finite; the {what} is {value} at step {step} of {steps}. Lower it, or "
            "train.max_grad_norm, or lengthen train.warmup_ratio",
        )


class BetweenSteps(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps a training's progress, and acts on it after every optimizer step.

    `transformers.Trainer` counts the steps that are left, so its step 1 is the first after those of `progress`.

    Args:
        progress: where the training is; updated in place.
        steps: of the round.
        evaluations: in the round; the last is after its last step.
        evaluate: scores the held-out rows, and enters the result into `progress`.
        capture: the training's state with the progress and the random state given.
        label: of the progress lines.
        on_metric: gets the points of the loss curve.
        learning_rate: the setting, named where training diverges.
        checkpoints: where the state is kept, at intervals and when a signal came; None keeps none.
        signal_received: number of the signal that came, 0 for none.
        resumed_from: the checkpoint whose random state the first step takes over.
    """

    def __init__(
        self,
        progress: TrainingProgress,
        steps: int,
        evaluations: int,
        evaluate: Callable[[], None],
        capture: Callable[[TrainingProgress, Tensors], Snapshot],
        label: str,
        on_metric: OnMetric,
        learning_rate: float,
        checkpoints: Checkpoints | None,
        signal_received: Callable[[], int],
        resumed_from: Snapshot | None,
    ) -> None:
        self._progress, self._steps, self._steps_before = progress, steps, progress.step
        self._steps_per_evaluation = max(1, steps // evaluations)
        self._evaluate, self._capture, self._on_metric = evaluate, capture, on_metric
        self._checkpoints, self._signal_received = checkpoints, signal_received
        self._resumed_from, self._learning_rate = resumed_from, learning_rate
        self._step_began: tuple[int, Tensors] = 0, {}
        self._kept_step = -1
        self._show, self._clock = Progress(label, steps), WorkClock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        bound_threads()  # Other steps on this machine come and go.
        if self._resumed_from is not None:
            restore_random(self._resumed_from)
            self._resumed_from = None
        if self._checkpoints is not None:
            self._step_began = int(state.num_input_tokens_seen), random_state()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Between the passes of a step, which may take longer together than a pod is given to end.

        What is kept is the state at the step's begin: only the random state has moved since.

        Raises:
            Stopped: a signal came, to this process or to another one of the training.
        """
        if self._checkpoints is not None and (signal := distributed.all_max(self._signal_received())):
            if self._kept_step != self._progress.step:
                self._keep(self._checkpoints, *self._step_began)
            raise self._stopped(signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        progress = self._progress
        progress.step = self._steps_before + state.global_step
        if progress.step % self._steps_per_evaluation == 0 or progress.step == self._steps:
            with self._clock.pause():
                self._evaluate()
        self._show(progress.step, f"eval loss {progress.evals[-1][1]:.3f}" if progress.evals else "")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        for name, value in (("loss", logs["loss"]), ("gradient norm", logs.get("grad_norm", 0.0))):
            check_finite(name, float(value), self._progress.step, self._steps, self._learning_rate)
        self._progress.losses.append(float(logs["loss"]))
        if point := self._progress.last_point(self._steps):
            self._on_metric("train_loss", *point)
        if self._checkpoints is not None:
            self._keep_or_stop(self._checkpoints, int(state.num_input_tokens_seen))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress.seconds += self._clock.seconds
        self._progress.tokens += int(state.num_input_tokens_seen)

    def _keep_or_stop(self, checkpoints: Checkpoints, tokens: int) -> None:
        """Write a checkpoint where one is due or a signal came, and end the training in the latter case.

        Raises:
            Stopped: a signal came, to this process or to another one of the training.
        """
        step = self._progress.step
        last_or_due = step == self._steps or checkpoints.due(step)
        # Processes act on the same step: on the first one's clock, and on a signal to any.
        signal, due = divmod(distributed.all_max(2 * self._signal_received() + last_or_due), 2)
        if signal or due:
            self._keep(checkpoints, tokens, random_state())
        if signal:
            raise self._stopped(signal)

    def _keep(self, checkpoints: Checkpoints, tokens: int, random: Tensors) -> None:
        with self._clock.pause():
            checkpoints.write(self._capture(self._so_far(tokens), random))
        self._kept_step = self._progress.step

    def _stopped(self, signal: int) -> Stopped:
        done = f"stopped after step {self._progress.step} of {self._steps}"
        return Stopped(signal, f"{done}; a retry resumes from there")

    def _so_far(self, tokens: int) -> TrainingProgress:
        progress = self._progress
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory_bytes())
        return replace(
            progress, seconds=progress.seconds + self._clock.seconds, tokens=progress.tokens + tokens
        )
