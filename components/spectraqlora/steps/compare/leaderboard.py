"""Which branch won, on the same rows."""

from __future__ import annotations

from spectraqlora.artifacts import Evaluation
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import method
from spectraqlora.scoring.statistics import difference_stderr

TIE_STDERRS = 2.0


def order_by_loss(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Best eval loss first.

    Raises:
        InputError: none at all, or not all from the same base model and data.
    """
    if not evaluations:
        raise InputError("evaluations", 0, "at least one branch")
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.base_digest != first.base_digest:
            raise InputError(
                f"{other.method} base_digest", other.base_digest[:12], f"{first.base_digest[:12]}"
            )
        if other.data_digest != first.data_digest:
            raise InputError(
                f"{other.method} data_digest", other.data_digest[:12], f"{first.data_digest[:12]}"
            )
    return sorted(evaluations, key=lambda e: e.eval_loss)


def winning_method(evaluations: list[Evaluation]) -> str:
    """The method with the lowest eval loss; ties within noise go to fewer trainable parameters.

    Two branches are tied where their losses differ by no more than `TIE_STDERRS` standard errors of that
    difference, taken over the same rows. A control wins only where nothing else was run.
    """
    ordered = order_by_loss([e for e in evaluations if not method(e.method).control] or evaluations)
    best = ordered[0]
    tied = [
        e
        for e in ordered
        if e.eval_loss - best.eval_loss
        <= TIE_STDERRS * difference_stderr(e.row_losses, best.row_losses, best.row_tokens)
    ]
    return min(tied, key=lambda e: (e.trainable_parameters, e.eval_loss)).method
