"""What to change so that a step fits into the memory that there is."""

from __future__ import annotations

import math
from typing import Any

from spectraqlora.planning.steps import GIB, Plan, StepMemory, step_memory
from spectraqlora.settings import Settings

_SHORTEST_ROW = 256
"""Tokens below which shorter rows are not advised."""


def changes(plan: Plan, memory: StepMemory, available: int) -> tuple[str, int]:
    """What to change so that a step fits, as --set assignments or a sentence, and the bytes that it then takes.

    Settings that cost time come before those that change what is learned.

    Args:
        plan: of the run.
        memory: the step of that plan that is to fit.
        available: bytes that it may take.
    """
    settings = plan.settings
    for key, values in _remedies(plan, memory.step):
        for value in values:
            changed = _with(settings, key, value)
            least = step_memory(plan.shape, changed, plan.cuda, memory.step, memory.method)
            if least.device >= memory.device:
                continue
            settings, memory = changed, least
            if memory.device <= available:
                return " ".join(_assignments(plan.settings, settings)), memory.device
    words = _assignments(plan.settings, settings)
    if memory.step == "merge-export" and plan.cuda:
        words = ["no GPU for this step, and"]
    elif plan.cuda:
        words.append("and a GPU of" if words else "a GPU of")
    return " ".join([*words, f"{math.ceil(memory.device / GIB)} GiB of memory"]), memory.device


def _remedies(plan: Plan, step: str) -> list[tuple[str, list[Any]]]:
    """Settings that lower a step's peak, each with values to try in order."""
    settings = plan.settings
    evaluation = ("evaluate.batch_size", _halves(settings.evaluate.batch_size, 1))
    length = ("data.max_length", _halves(settings.data.max_length, _SHORTEST_ROW))
    calibration = ("select.calibration_rows", _halves(settings.select.calibration_rows, 1))
    checkpointing = ("train.gradient_checkpointing", ["some", "on"])
    batch = ("train.batch_size", _halves(settings.train.batch_size, 1))
    optimizer = [("train.optimizer", ["adamw_8bit"])] if plan.cuda else []
    remedies: dict[str, list[tuple[str, list[Any]]]] = {
        "measure-base": [evaluation, calibration, length],
        "train": [checkpointing, evaluation, batch, *optimizer, length],
        "re-evaluate": [evaluation, calibration, length],
        "merge-export": [evaluation],
    }
    return remedies.get(step, [])


def _halves(value: int, least: int) -> list[int]:
    halves = []
    while value // 2 >= least:
        value //= 2
        halves.append(value)
    return halves


def _with(settings: Settings, key: str, value: Any) -> Settings:
    """The settings with one changed; a smaller batch is made up for by more passes per step."""
    section, _, name = key.partition(".")
    values = settings.model_dump(mode="json")
    values[section][name] = value
    if key == "train.batch_size":
        rows = settings.train.gradient_accumulation * settings.train.batch_size
        values["train"]["gradient_accumulation"] = rows // int(value)
    return Settings.model_validate(values)


def _assignments(before: Settings, after: Settings) -> list[str]:
    """The --set arguments that lead from one to the other."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [
        f"--set {section}.{name}={value}"
        for section, values in new.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value != old[section][name]
    ]
