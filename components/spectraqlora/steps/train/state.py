"""The state of a training between two optimizer steps, as plain tensors and JSON values.

Nothing here is ever pickled: tensors go to safetensors, numbers and names to JSON, so that reading a
checkpoint cannot run code, whoever wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spectraqlora.steps.train import distributed

Tensors = dict[str, torch.Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""What optimizers keep in the shape of a parameter."""


@dataclass
class TrainingProgress:
    """What a training has done so far.

    Args:
        step: optimizer steps done in this round.
        losses: training loss of every step, nats per counted token.
        evals: (step, eval loss).
        best_loss: lowest eval loss.
        best: adapter weights of the lowest eval loss.
        seconds: spent training, evaluations and checkpoints left out.
        tokens: trained on.
        peak_memory_bytes: of all attempts.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    evals: list[tuple[int, float]] = field(default_factory=list)
    best_loss: float = math.inf
    best: Tensors = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0

    def curve(self, points: int = 100) -> list[tuple[int, float]]:
        """(step, mean loss since the point before) at about as many points as asked for."""
        width = max(1, len(self.losses) // points)
        return [self._point(end, width) for end in range(width, len(self.losses) + 1, width)]

    def last_point(self, steps: int, points: int = 100) -> tuple[int, float] | None:
        """The point that the last loss completes on the curve of a training of so many steps."""
        width = max(1, steps // points)
        return None if len(self.losses) % width else self._point(len(self.losses), width)

    def _point(self, end: int, width: int) -> tuple[int, float]:
        return end, math.fsum(self.losses[end - width : end]) / width


@dataclass(frozen=True)
class Snapshot:
    """A training's state, detached from it."""

    tensors: Tensors
    facts: dict[str, Any]


def capture(
    model: Any, optimizer: Any, schedule: Any, progress: TrainingProgress, random: Tensors
) -> Snapshot:
    """Copies of every trained parameter, optimizer, schedule, random state and progress.

    Several processes take part together; parameters and optimizer are the same in all, random states are not.
    """
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"best.{name}": weight for name, weight in progress.best.items()}
    entries = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entry in entries["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    tensors["progress.losses"] = torch.tensor(progress.losses, dtype=torch.float64)
    # Dropout is all that draws while training runs; it draws from torch's generators.
    for kind, own in random.items():
        states = distributed.all_gather(own)
        tensors |= {f"random.{kind}.{index}": state for index, state in enumerate(states)}
    rates = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
    facts = {
        "optimizer": {"scalars": scalars, "groups": entries["param_groups"]},
        "schedule": rates,
        "progress": {
            name: getattr(progress, name)
            for name in ("step", "evals", "best_loss", "seconds", "tokens", "peak_memory_bytes")
        },
    }
    return Snapshot({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, facts)


def check_fits(snapshot: Snapshot, own: Snapshot, shapes: Sequence[torch.Size]) -> None:
    """Refuse a state that `restore` could not put back whole.

    Args:
        snapshot: read from a checkpoint, which anybody may have written who can write to the store.
        own: state of this training before its first step, with adapter weights as the best ones.
        shapes: of the optimizer's parameters, in its order.

    Raises:
        ValueError: the part of the state that is missing, surplus, of another shape or type, or not finite.
    """
    for part in ("model.", "best.", "random."):
        found, expected = _below(part, snapshot.tensors), _below(part, own.tensors)
        if part == "best." and not found:
            continue  # Nothing has been evaluated by then.
        for name in sorted(found.keys() | expected.keys()):
            kinds = [
                (t.dtype, tuple(t.shape)) if t is not None else None
                for t in (found.get(name), expected.get(name))
            ]
            if kinds[0] != kinds[1]:
                raise ValueError(f"{part}{name} is {kinds[0]}, where this training has {kinds[1]}")
            if found[name].is_floating_point() and not torch.isfinite(found[name]).all():
                raise ValueError(f"{part}{name} is not finite")
    for name, state in _below("random.cpu.", snapshot.tensors).items():
        try:
            torch.Generator().set_state(state)
        except RuntimeError as fault:
            raise ValueError(f"random.cpu.{name} is no state of torch's generator: {fault}") from None
    for name, tensor in _below("optimizer.", snapshot.tensors).items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(shapes):
            raise ValueError(f"optimizer.{name} belongs to none of {len(shapes)} parameters")
        if key in _MOMENTS and tensor.shape != shapes[int(index)]:
            raise ValueError(
                f"optimizer.{name} is {tuple(tensor.shape)}, its parameter {tuple(shapes[int(index)])}"
            )
    try:
        _check_facts(snapshot.facts, own.facts, snapshot.tensors["progress.losses"])
    except (KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"its numbers are incomplete: {fault!r}") from None


def _check_facts(facts: dict[str, Any], own: dict[str, Any], losses: torch.Tensor) -> None:
    groups = [[(_kinds(g), g["params"]) for g in f["optimizer"]["groups"]] for f in (facts, own)]
    if groups[0] != groups[1]:
        raise ValueError("its parameter groups are another optimizer's")
    if _kinds(facts["schedule"]) != _kinds(own["schedule"]):
        raise ValueError("its schedule is of another kind")
    scalars = facts["optimizer"]["scalars"]
    if not all(index.isdecimal() for index in scalars):
        raise ValueError("its optimizer's numbers are without a parameter")
    if not all(
        _kinds(value) in ("number", "truth") for entry in scalars.values() for value in entry.values()
    ):
        raise ValueError(f"its optimizer's numbers are {scalars}"[:200])
    numbers = facts["progress"]
    if numbers.keys() != own["progress"].keys():
        raise ValueError(f"its progress is {', '.join(sorted(numbers))}")
    whole = [numbers[name] for name in ("step", "tokens", "peak_memory_bytes")]
    if not all(type(number) is int and number >= 0 for number in whole):
        raise ValueError(f"its step, tokens and memory are {whole}")
    reals = [numbers["seconds"], numbers["best_loss"], *(loss for _, loss in numbers["evals"])]
    if not all(type(number) in (int, float) for number in reals):
        raise ValueError(f"its seconds and losses are {reals}")
    if losses.shape != (numbers["step"],) or not torch.isfinite(losses).all():
        raise ValueError(
            f"it has {tuple(losses.shape)} finite losses, not one for each of {numbers['step']} steps"
        )


def _kinds(value: Any) -> Any:
    """What a value consists of, numbers and their kinds apart from their size: what JSON keeps of an optimizer's state."""
    if isinstance(value, dict):
        return {key: _kinds(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_kinds(entry) for entry in value]
    if isinstance(value, bool) or value is None:
        return "truth"
    if isinstance(value, int | float):
        return "number" if math.isfinite(value) else "no finite number"
    return "text"


def restore(snapshot: Snapshot, model: Any, optimizer: Any, schedule: Any) -> TrainingProgress:
    """Put parameters, optimizer and schedule back; `restore_random` does the rest when training starts."""
    tensors, facts = snapshot.tensors, snapshot.facts
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in _below("optimizer.", tensors).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    for index, scalars in facts["optimizer"]["scalars"].items():
        state.setdefault(int(index), {}).update(scalars)
    optimizer.load_state_dict({"state": state, "param_groups": facts["optimizer"]["groups"]})
    schedule.load_state_dict({**schedule.state_dict(), **facts["schedule"]})
    numbers = facts["progress"]
    return TrainingProgress(
        **{**numbers, "evals": [(step, loss) for step, loss in numbers["evals"]]},
        losses=tensors["progress.losses"].tolist(),
        best=_below("best.", tensors),
    )


def random_state() -> Tensors:
    """This process's random state by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(snapshot: Snapshot) -> None:
    """Put the random state back; everything that draws before the first step must have drawn."""
    index = distributed.process_index()
    torch.set_rng_state(snapshot.tensors[f"random.cpu.{index}"])
    if torch.cuda.is_available() and f"random.cuda.{index}" in snapshot.tensors:
        torch.cuda.set_rng_state(snapshot.tensors[f"random.cuda.{index}"])


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
