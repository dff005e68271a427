"""Rows that no step prepared: random ones, with the manifest that training reads."""

from __future__ import annotations

from pathlib import Path

from spectraqlora.artifacts import DataAccount, PreparedRows


def write_manifest(folder: Path, train: int, held_out: int, tokens: int) -> None:
    """A manifest next to `train/` and `held_out/`: so many rows of each, of so many tokens, all learned."""
    account = DataAccount(
        files={},
        unused_files=[],
        read=train + held_out,
        used=train + held_out,
        dropped=[],
        unused_columns=[],
        turns_without_labels={},
        left_out={},
        tokens_read=(train + held_out) * tokens,
        tokens_learned=train * tokens,
        max_length=tokens,
        lengths=[tokens] * 4,
    )
    PreparedRows(
        source="random",
        digest="random",
        layout="text",
        train_rows=train,
        eval_rows=held_out,
        train_tokens=train * tokens,
        account=account,
        examples=[],
        answers=[],
    ).write(folder)
