"""Text with learned spans as token ids and labels."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from spectraqlora.artifacts import IGNORED
from spectraqlora.data.rows import RowRefused

Span = tuple[int, int]


def tokenized(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[tuple[list[int], list[int]] | RowRefused]:
    """(token ids, labels) of every text, tokenized whole and without special tokens of the tokenizer's own.

    A token is learned where any of its characters is.

    Args:
        tokenizer: fast ones say which characters a token covers; with others, what precedes a span has to have
            the tokens that it has in the whole text, else the row is refused.
        texts: whole.
        spans: learned characters of each text, in order.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [_by_prefix(tokenizer, text, part) for text, part in zip(texts, spans, strict=True)]
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    )
    return [
        (ids, _labels(ids, encoding, part))
        for ids, encoding, part in zip(encoded["input_ids"], encoded.encodings, spans, strict=True)
    ]


def _labels(ids: list[int], encoding: Any, spans: Sequence[Span]) -> list[int]:
    """As `labels_of`; of the tokens only those at the spans' ends are asked for their characters."""
    labels = [IGNORED] * len(ids)
    for first, stop in spans:
        begin, last = encoding.char_to_token(first), encoding.char_to_token(stop - 1)
        if (
            begin is None or last is None
        ):  # No token has this character: a tokenizer that leaves out white space.
            return labels_of(ids, encoding.offsets, spans)
        while begin > 0 and encoding.token_to_chars(begin - 1) == (first, first):
            begin -= 1
        while last + 1 < len(ids) and encoding.token_to_chars(last + 1)[0] < stop:
            last += 1
        labels[begin : last + 1] = ids[begin : last + 1]
    return labels


def labels_of(ids: list[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """The ids inside spans, IGNORED elsewhere.

    Args:
        ids: tokens.
        offsets: characters of each; without any, a token is where it stands.
        spans: in order, apart from each other.
    """
    labels = [IGNORED] * len(ids)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    for first, stop in spans:
        # Tokens of a character share its offsets, and a token without any may stand where a span begins.
        inside = slice(bisect_right(ends, first), bisect_left(starts, stop))
        while inside.start > 0 and starts[inside.start - 1] == ends[inside.start - 1] == first:
            inside = slice(inside.start - 1, inside.stop)
        labels[inside] = ids[inside]
    return labels


def _by_prefix(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]] | RowRefused:
    ids = _ids(tokenizer, text)
    labels = [IGNORED] * len(ids)
    for span in spans:
        places = []
        for character in span:
            before = _ids(tokenizer, text[:character])
            if ids[: len(before)] != before:
                return RowRefused("the tokenizer is not a fast one, and a turn begins or ends inside a token")
            places.append(len(before))
        labels[places[0] : places[1]] = ids[places[0] : places[1]]
    return ids, labels


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
