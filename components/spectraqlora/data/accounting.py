"""What became of everything that was read: counted while rows are prepared, and said as one block."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from spectraqlora.artifacts import DataAccount, DroppedRows, Example, PreparedRows, SourceAccount
from spectraqlora.data.rows import Origin

LOST_SHARE = 0.1
"""A warning names the settings where more of the rows than this are lost."""
TOO_LONG = "longer than data.max_length"
"""The reason of rows that are dropped for their length."""
_NAMED_FILES = 3


@dataclass
class Counter:
    """Counts rows that are not used, by reason, with the first of each."""

    dropped: dict[str, DroppedRows] = field(default_factory=dict)
    of_source: dict[int, collections.Counter[str]] = field(default_factory=dict)

    def drop(
        self, reason: str, origin: Origin, detail: str = "", setting: str = "", asked_for: bool = False
    ) -> None:
        """Count one row.

        Args:
            reason: the same for all rows of its kind.
            origin: of the row.
            detail: what was wrong with it.
            setting: that would keep such rows.
            asked_for: whether a setting said so.
        """
        self.of_source.setdefault(origin.source, collections.Counter())[reason] += 1
        entry = self.dropped.get(reason)
        if entry is None:
            first = f"{origin}: {detail}" if detail else str(origin)
            self.dropped[reason] = DroppedRows(
                reason=reason, rows=1, first=first, setting=setting, asked_for=asked_for
            )
        else:
            entry.rows += 1

    def total(self) -> int:
        """Rows that are not used."""
        return sum(entry.rows for entry in self.dropped.values())

    def reasons(self) -> str:
        """All reasons in one line, the most frequent first."""
        ordered = sorted(self.dropped.values(), key=lambda entry: -entry.rows)
        return "; ".join(f"{entry.rows} {entry.reason} (first: {entry.first})" for entry in ordered)


def quantiles(lengths: Sequence[int] | np.ndarray) -> list[int]:
    """Median, 90 %, 99 % and greatest of lengths; empty where there are none."""
    if not len(lengths):
        return []
    return [int(value) for value in np.quantile(lengths, [0.5, 0.9, 0.99, 1.0], method="higher")]


def facts(rows: PreparedRows) -> list[tuple[str, str]]:
    """The block as pairs of what and how much, in order."""
    account = rows.account
    names = {"train": "train", "held_out": "held-out", "test": "test"}
    files = ", ".join(f"{count} {names[split]}" for split, count in account.files.items())
    many = len(account.files) > 1 or sum(account.files.values()) != 1
    pairs = [
        ("source", f"{rows.source}, layout {rows.layout}" + (f"; files: {files}" if many else "")),
        ("read", f"{account.read:,} rows"),
        ("trained on", f"{rows.train_rows:,} {_sequences(account)}, {rows.train_tokens:,} tokens"),
        ("held out", f"{rows.eval_rows:,}, {len(rows.answers):,} with a short answer"),
    ]
    if rows.test_rows:
        pairs.append(("test", f"{rows.test_rows:,}, kept apart: neither trained on nor chosen by"))
    for number, part in enumerate(account.sources, 1):
        pairs.append((f"source {number}", _of_source(part)))
    for entry in account.dropped:
        hint = f"; {entry.setting} keeps them" if entry.setting and not entry.asked_for else ""
        pairs.append(
            (
                "left out" if entry.asked_for else "dropped",
                f"{entry.rows:,} {entry.reason}{hint} (first: {entry.first})",
            )
        )
    if not account.dropped:
        pairs.append(("dropped", "none"))
    if account.cut:
        pairs.append(("cut", f"{account.cut:,} rows, to {account.max_length} tokens (data.too_long)"))
    if account.pieces:
        pairs.append(("split", f"long rows into {account.pieces:,} pieces more (data.too_long)"))
    if account.equal:
        side = (
            "all are equal, so held-out rows are trained on, too"
            if account.sides_equal
            else "kept on its side"
        )
        pairs.append(
            (
                "equal",
                f"{account.equal:,} rows equal an earlier one: {side}; data.deduplicate=exact keeps one",
            )
        )
    share = account.tokens_learned / account.tokens_read if account.tokens_read else 0.0
    pairs.append(
        ("learned", f"{account.tokens_learned:,} of {account.tokens_read:,} tokens read ({share:.0%})")
    )
    if account.turns_without_labels:
        turns = sum(account.turns_without_labels.values())
        reasons = ", ".join(f"{count:,} {why}" for why, count in account.turns_without_labels.items())
        pairs.append(("not learned", f"{turns:,} of the assistant's turns: {reasons}"))
    if account.left_out:
        parts = ", ".join(f"{what} {count:,} times" for what, count in account.left_out.items())
        pairs.append(("not written", f"by the template: {parts}"))
    if account.lengths:
        median, most, nearly_all, longest = account.lengths
        pairs.append(
            (
                "tokens a row",
                f"median {median:,}, 90 % {most:,}, 99 % {nearly_all:,}, longest {longest:,}; the limit is {account.max_length:,}",
            )
        )
    if account.unused_columns:
        pairs.append(("columns unused", ", ".join(account.unused_columns)))
    if account.unused_files:
        pairs.append(("files unused", _named(account.unused_files)))
    return pairs


def warning(rows: PreparedRows) -> str:
    """A line where more than a tenth of the rows was lost, with the settings that would keep them; else empty."""
    account = rows.account
    lost = [entry for entry in account.dropped if not entry.asked_for]
    count = sum(entry.rows for entry in lost)
    if not account.read or count <= LOST_SHARE * account.read:
        return ""
    settings = list(dict.fromkeys(entry.setting for entry in lost if entry.setting))
    keep = f"; to keep them: {', or '.join(settings)}" if settings else ""
    reasons = ", ".join(f"{entry.rows:,} {entry.reason}" for entry in lost)
    return f"{count:,} of {account.read:,} rows are lost ({count / account.read:.0%}): {reasons}{keep}"


def lines(rows: PreparedRows) -> list[str]:
    """The block as plain lines."""
    block = [f"{name:<15} {value}" for name, value in facts(rows)]
    block += [
        f"{f'example {number}':<15} {marked(example)}" for number, example in enumerate(rows.examples, 1)
    ]
    lost = warning(rows)
    return [*block, f"WARNING: {lost}"] if lost else block


def marked(example: Example) -> str:
    """An example in one line: the learned part between » and «."""
    return "".join(f"»{text}«" if learned else text for text, learned in example).replace("\n", "\\n")


def _of_source(part: SourceAccount) -> str:
    """What became of one source's rows, in a line."""
    weight = "" if part.weight is None else f", weight {part.weight:g}"
    kept = f"{part.train:,} trained on, {part.held_out:,} held out, {part.test:,} for the test"
    rest = "".join(f", {rows:,} {reason}" for reason, rows in part.dropped.items())
    return f"{part.source}{weight}: {part.read:,} rows, {kept}{rest}"


def _sequences(account: DataAccount) -> str:
    return "sequences" if account.pieces else "rows"


def _named(names: list[str]) -> str:
    rest = len(names) - _NAMED_FILES
    return ", ".join(names[:_NAMED_FILES]) + (f" and {rest} more" if rest > 0 else "")
