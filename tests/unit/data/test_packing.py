"""Plain text in full sequences."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from spectraqlora.data.packing import packed


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1), st.integers(1, 12))
def test_sequences_are_full_and_in_order_and_only_a_rest_is_left(rows: list[list[int]], length: int) -> None:
    tokens = [token for row in rows for token in row]
    pieces = list(packed([(np.array(row, np.int32), -np.array(row, np.int32)) for row in rows], length))
    assert all((ids == -labels).all() for ids, labels in pieces)
    sequences = [ids.tolist() for ids, _ in pieces]
    together = [token for sequence in sequences for token in sequence]
    assert together == tokens[: len(together)]
    if len(tokens) < length:
        assert sequences == [tokens]
    else:
        assert {len(sequence) for sequence in sequences} == {length}
        assert len(tokens) - len(together) < length
