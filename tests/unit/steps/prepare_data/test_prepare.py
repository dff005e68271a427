"""Rows through the step: labels, dropping, packing, splits."""

import json
from pathlib import Path

from spectraqlora.artifacts import PreparedRows
from spectraqlora.scoring.batches import load_rows
from spectraqlora.settings import DataSettings
from spectraqlora.steps.prepare_data.prepare import prepare


def _jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_only_completions_count_and_empty_and_long_rows_are_dropped(outline: Path, tmp_path: Path) -> None:
    rows = [{"question": f"who is {i}?", "answer": "red"} for i in range(18)]
    rows += [{"question": "x", "answer": ""}, {"question": "y " * 300, "answer": "blue"}]
    source = _jsonl(tmp_path / "d.jsonl", rows)
    out = tmp_path / "out"
    found = prepare(DataSettings(source=source, max_length=64), outline, 1, out)
    assert (found.dropped_empty, found.dropped_long) == (1, 1)
    assert found.train_rows + found.eval_rows == 18
    from spectraqlora.models.loading import load_tokenizer

    tokenizer = load_tokenizer(outline / "model")
    row = load_rows(out, "train")[0]
    counted = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(counted) == " red</s>"
    assert tokenizer.decode(row["input_ids"]).startswith("<s>Question: who is")
    assert PreparedRows.read(out).answers[0]["answer"] == "red"


def test_rows_end_where_the_model_has_no_more_positions(outline: Path, tmp_path: Path) -> None:
    # The model has 128.
    rows = [{"question": "who?", "answer": "red"}] * 8 + [{"question": "y " * 200, "answer": "red"}] * 2
    found = prepare(DataSettings(source=_jsonl(tmp_path / "d.jsonl", rows)), outline, 1, tmp_path / "rows")
    assert (found.dropped_long, found.train_rows + found.eval_rows) == (2, 8)
    text = _jsonl(tmp_path / "t.jsonl", [{"text": "mara likes red . " * 80}] * 4)
    prepare(DataSettings(source=text, pack=True), outline, 1, tmp_path / "text")
    assert {len(row["input_ids"]) for row in load_rows(tmp_path / "text", "train")} == {128}


def test_plain_text_counts_every_token_and_packs_to_full_sequences(outline: Path, tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "t.jsonl", [{"text": "mara likes red . " * 5} for _ in range(30)])
    prepare(DataSettings(source=source, max_length=32, pack=True), outline, 1, tmp_path / "o")
    rows = load_rows(tmp_path / "o", "train")
    assert all(len(r["input_ids"]) == 32 and r["labels"] == r["input_ids"] for r in rows)


def test_the_split_is_the_seeds(outline: Path, tiny_rows: Path, tmp_path: Path) -> None:
    digests = [
        prepare(DataSettings(source=str(tiny_rows)), outline, seed, tmp_path / str(i)).digest
        for i, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_rows_stay_on_their_side_as_data_grows(outline: Path, tmp_path: Path) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(60)]

    def held_out(part: list[dict], split_by: str) -> set[str]:
        settings = DataSettings(
            source=_jsonl(tmp_path / "r.jsonl", part), split_by=split_by, eval_fraction=0.5, max_eval_rows=10
        )  # type: ignore[arg-type]
        prepare(settings, outline, 1, tmp_path / "data")
        answers = PreparedRows.read(tmp_path / "data").answers
        return {answer["answer"] for answer in answers}

    before, after = held_out(rows[:40], "content"), held_out(list(reversed(rows)), "content")
    grown = {row["answer"] for row in rows[40:]}
    assert len(before) == len(after) == 10
    assert after - before <= grown, "no row that was trained on is held out later"
    assert held_out(rows, "shuffle") - held_out(rows[:40], "shuffle") - grown
