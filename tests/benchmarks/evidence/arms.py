"""What the study compares: arms, the tables that show them, and whose learning rate an arm takes.

Sources of the initialisations: PiSSA (arXiv 2404.02948), EVA (2410.07170), LoRA-GA (2407.05000), each by PEFT's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Initialiser = Literal["pissa", "eva", "lora_ga"]
CONDITION_NUMBER = "condition number"
"""Not a method of the product: the half of all matrices that PEFT finds best conditioned."""
RANK = 16


@dataclass(frozen=True)
class Arm:
    """A method with its selection settings.

    Args:
        name: in the field's terms.
        method: of the catalogue, or `CONDITION_NUMBER`.
        tuned_as: the arm whose learning rate it takes.
        select: the settings that differ from the study's.
        initialiser: PEFT's, of A and B; empty leaves them to the method.
        lengths: how many times the study's steps it trains.
        rounds: in how many equal parts; between them the method re-evaluates, and moves what it moves.
    """

    name: str
    method: str
    tuned_as: str
    select: Mapping[str, Any] = field(default_factory=dict)
    initialiser: Initialiser | None = None
    lengths: int = 1
    rounds: int = 1


@dataclass(frozen=True)
class Table:
    """Arms side by side, and the one that the others are compared with."""

    reference: str
    arms: tuple[Arm, ...]


# Arms whose A starts alike take one rate: that of qlora where it starts at random, that of hybrid where it starts from
# the gradient. What the initialisers start from has its own.
QLORA, GRADIENT = "qlora", "qlora, gradient start"
HYBRID, SGM, RANDOM = "hybrid-50, gradient energy", "sgm, gradient energy", "random-50"
_GRADIENT_START = {"gradient_init": "on"}
_AT_RANK_16 = (
    Arm(QLORA, "qlora", QLORA),
    Arm(GRADIENT, "qlora", HYBRID, _GRADIENT_START),
    Arm("qlora, half the rank, gradient start", "qlora_half", HYBRID),
    Arm(HYBRID, "hybrid", HYBRID),
    Arm(SGM, "sgm", HYBRID),
    Arm("hybrid-50, weight SNR", "hybrid", QLORA, {"signal": "spectrum"}),
    Arm(RANDOM, "random", QLORA),
    Arm("random-50, gradient start", "random", HYBRID, _GRADIENT_START),
    Arm("hybrid-50, gradient energy, random start", "hybrid", QLORA, {"gradient_init": "off"}),
    Arm("condition number-50", CONDITION_NUMBER, QLORA),
    Arm("alors, gradient energy", "alors", HYBRID),
    Arm("qlora, PiSSA", "qlora", "qlora, PiSSA", initialiser="pissa"),
    Arm("qlora, EVA", "qlora", "qlora, EVA", initialiser="eva"),
    Arm("qlora, LoRA-GA", "qlora", "qlora, LoRA-GA", initialiser="lora_ga"),
)
CURVES = {
    name: tuple(
        Arm(name if rank == RANK else f"{name}, rank {rank}", method, HYBRID, {**select, "rank": rank})
        for rank in (8, 4, 32, 2, RANK)
    )
    for name, method, select in (
        (GRADIENT, "qlora", _GRADIENT_START),
        (HYBRID, "hybrid", {}),
        (SGM, "sgm", {}),
    )
}
"""Arms at several ranks, by the name of that at rank 16."""
_SHARING = (
    Arm(HYBRID, "hybrid", HYBRID),
    Arm(SGM, "sgm", HYBRID),
    Arm("sgm, inside one block", "sgm", HYBRID, {"group_layers": 1}),
    Arm("sgm, B as well", "sgm", HYBRID, {"group_sides": "both"}),
    Arm("sgm, whole blocks, B as well", "sgm", HYBRID, {"group_within": "block", "group_sides": "both"}),
    Arm("sgm, savings spent on rank", "sgm", HYBRID, {"spend_savings": True}),
    Arm("sgm, cosine of whole gradients", "sgm", HYBRID, {"similarity_of": "gradient"}),
)
_ONE_ROUND = "alors, one round of twice the steps"
_ROUNDS = (
    Arm(_ONE_ROUND, "alors", HYBRID, lengths=2),
    Arm("alors, two rounds", "alors", HYBRID, lengths=2, rounds=2),
    Arm("hybrid-50, one round of twice the steps", "hybrid", HYBRID, lengths=2),
    Arm("hybrid-50, two rounds", "hybrid", HYBRID, lengths=2, rounds=2),
)
_FEW = ("qlora, half the rank, gradient start", QLORA, HYBRID, "hybrid-50, weight SNR", SGM, RANDOM)
TABLES = {
    "arms": Table(QLORA, _AT_RANK_16),
    "curve": Table(HYBRID, tuple(arm for curve in CURVES.values() for arm in curve)),
    "sharing": Table(HYBRID, _SHARING),
    "rounds": Table(_ONE_ROUND, _ROUNDS),
    "few": Table(QLORA, tuple(arm for arm in _AT_RANK_16 if arm.name in _FEW)),
}
"""By name: methods, signals and starts at rank 16; loss over parameters; variants of sgm; rounds; some of the first."""


def arms(tables: list[str]) -> dict[str, Arm]:
    """Arms of the tables named by their names, in their order."""
    return {arm.name: arm for name in tables for arm in TABLES[name].arms}
