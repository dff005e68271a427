"""Train and held-out rows."""

import pytest
from datasets import Dataset
from spectraqlora.data.splits import in_order, split_sizes
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        (100, {}, (80, 20)),
        (100, {"max_eval_rows": 5}, (95, 5)),
        (100, {"max_rows": 10}, (8, 2)),
        (2, {"eval_fraction": 0.5}, (1, 1)),
    ],
)
def test_the_held_out_share_is_bounded(rows: int, settings: dict, expected: tuple[int, int]) -> None:
    assert split_sizes(rows, DataSettings(**settings)) == expected


@pytest.mark.parametrize(("rows", "share"), [(3, 0.01), (2, 0.9), (0, 0.5)])
def test_both_sides_have_rows_or_the_split_is_refused(rows: int, share: float) -> None:
    with pytest.raises(InputError, match=r"data\.eval_fraction"):
        split_sizes(rows, DataSettings(eval_fraction=share))


def test_by_content_the_order_of_rows_is_no_matter_and_grown_data_keeps_it() -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(50)]
    settings = DataSettings(split_by="content")

    def order(part: list[dict[str, str]], seed: int = 1) -> list[str]:
        return list(in_order(Dataset.from_list(part), settings, seed)["question"])

    assert order(rows) == order(rows[::-1]) != order(rows, seed=2)
    before = order(rows[:30])
    assert [name for name in order(rows) if name in before] == before


def test_at_most_so_many_rows_are_taken() -> None:
    rows = Dataset.from_list([{"text": str(i)} for i in range(20)])
    assert len(in_order(rows, DataSettings(max_rows=7), 1)) == 7
    assert len(in_order(rows, DataSettings(max_rows=70), 1)) == 20
    assert sorted(in_order(rows, DataSettings(), 1)["text"]) == sorted(rows["text"])
