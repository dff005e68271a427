"""Which branch won, on the same rows."""

from __future__ import annotations

from spectraqlora.artifacts import Evaluation
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import method
from spectraqlora.scoring.statistics import PairedTest, paired_test


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


def against_best(evaluations: list[Evaluation]) -> dict[str, PairedTest]:
    """Every branch against the one with the lowest loss that can win, by method: one paired test over the rows.

    A control can win only where nothing else was run. Where a control's loss is lower its difference is below zero.
    """
    ordered = order_by_loss(evaluations)
    best = next((e for e in ordered if not method(e.method).control), ordered[0])
    return {e.method: paired_test(e.row_losses, best.row_losses, best.row_tokens) for e in ordered}


def winning_method(evaluations: list[Evaluation]) -> str:
    """The method that trains the fewest parameters among those tied with the lowest eval loss.

    Tied are branches whose paired test against the best says that they do not differ (`against_best`); where
    these train equally many parameters, the lower loss wins. A control wins only where nothing else was run.
    """
    tests = against_best(evaluations)
    able = [e for e in evaluations if not method(e.method).control] or evaluations
    tied = [e for e in able if tests[e.method].tied]
    return min(tied, key=lambda e: (e.trainable_parameters, e.eval_loss)).method
