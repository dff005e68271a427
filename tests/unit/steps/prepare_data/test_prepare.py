"""Rows through the step: labels, dropping, cutting, packing, splits, and the account of it all."""

import json
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.artifacts import IGNORED, PreparedRows
from spectraqlora.data.accounting import facts, lines, warning
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.scoring.batches import load_rows
from spectraqlora.settings import DataSettings
from spectraqlora.steps.prepare_data.prepare import prepare


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def _questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"who is {i}?", "answer": "red"} for i in range(start, start + count)]


def _texts(folder: Path, outline: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(outline / "model")
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in load_rows(folder, split)]


def test_only_completions_count_and_what_is_dropped_is_said_with_its_first_row(
    outline: Path, tmp_path: Path
) -> None:
    rows = [
        *_questions(18),
        {"question": "x", "answer": ""},
        {"question": "y " * 300, "answer": "blue", "id": 7},
    ]
    source = _jsonl(tmp_path / "d.jsonl", rows)
    out = tmp_path / "out"
    result = prepare(DataSettings(source=source, max_length=64, test_fraction=0), outline, 1, out)
    account = result.account
    assert (account.read, account.used) == (20, 18)
    assert {d.reason: (d.rows, d.first.partition(":")[0]) for d in account.dropped} == {
        "no answer": (1, f"{source}, row 19"),
        "longer than data.max_length": (1, f"{source}, row 20"),
    }
    assert account.unused_columns == ["id"]
    assert result.train_rows + result.eval_rows == 18 and not result.test_rows
    tokenizer = load_tokenizer(outline / "model")
    row = load_rows(out, "train")[0]
    counted = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(counted) == " red</s>"
    assert tokenizer.decode(row["input_ids"]).startswith("<s>Question: who is")
    read = PreparedRows.read(out)
    assert read.answers[0]["answer"] == "red" and len(read.answers) == result.eval_rows
    assert [learned for _, learned in read.examples[0]] == [False, True]
    assert read.examples[0][1][0] == " red</s>"
    learned = sum(label != IGNORED for row in load_rows(out, "train") for label in row["labels"])
    assert account.tokens_learned == learned == 2 * result.train_rows
    assert sorted(path.name for path in out.iterdir()) == ["held_out", "manifest.json", "train"]


def test_more_than_a_tenth_lost_is_a_warning_that_names_the_settings(
    outline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*_questions(9), *({"question": f"y {i} " * 300, "answer": "blue"} for i in range(91))]
    result = prepare(DataSettings(source=_jsonl(tmp_path / "d.jsonl", rows)), outline, 1, tmp_path / "o")
    said = capsys.readouterr().out
    assert "WARNING: 91 of 100 rows are lost (91%)" in said
    assert "data.max_length or data.too_long" in warning(result)
    assert "tokens a row" in said and "example 1" in said and "» red</s>«" in said
    small = prepare(DataSettings(source=_jsonl(tmp_path / "e.jsonl", rows[:10])), outline, 1, tmp_path / "o")
    assert small.account.dropped and not warning(small)
    limited = DataSettings(source=_jsonl(tmp_path / "f.jsonl", _questions(30)), max_rows=10)
    cut = prepare(limited, outline, 1, tmp_path / "o")
    assert cut.account.dropped[0].asked_for and not warning(cut)
    assert "20 beyond data.max_rows" in "\n".join(lines(cut))


def test_rows_end_where_the_model_has_no_more_positions(outline: Path, tmp_path: Path) -> None:
    # The model has 128.
    rows = [*_questions(8), *({"question": f"{i} y" * 200, "answer": "red"} for i in range(2))]
    result = prepare(DataSettings(source=_jsonl(tmp_path / "d.jsonl", rows)), outline, 1, tmp_path / "rows")
    assert result.account.dropped[0].rows == 2
    assert (result.train_rows, result.eval_rows, result.test_rows) == (5, 2, 1)
    assert result.account.max_length == 128
    text = _jsonl(tmp_path / "t.jsonl", [{"text": f"mara {i} likes red . " * 80} for i in range(4)])
    prepare(DataSettings(source=text, pack=True), outline, 1, tmp_path / "text")
    assert {len(row["input_ids"]) for row in load_rows(tmp_path / "text", "train")} == {128}


def test_plain_text_counts_every_token_and_packs_to_full_sequences(outline: Path, tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "t.jsonl", [{"text": f"mara {i} likes red . " * 5} for i in range(30)])
    prepare(DataSettings(source=source, max_length=32, pack=True), outline, 1, tmp_path / "o")
    rows = load_rows(tmp_path / "o", "train")
    assert all(len(r["input_ids"]) == 32 and r["labels"] == r["input_ids"] for r in rows)


def test_long_documents_are_split_into_pieces_that_stay_on_one_side(outline: Path, tmp_path: Path) -> None:
    documents = [{"text": " ".join([str(i), "word"] * 40)} for i in range(10)]
    result = prepare(
        DataSettings(source=_jsonl(tmp_path / "d.jsonl", documents), max_length=32),
        outline,
        1,
        tmp_path / "o",
    )
    assert not result.account.dropped and result.account.used == 10 and result.account.pieces > 10
    sides = {split: _texts(tmp_path / "o", outline, split) for split in ("train", "held_out", "test")}
    numbers = {
        split: {word for text in texts for word in text.split() if word.isdigit()}
        for split, texts in sides.items()
    }
    assert set().union(*numbers.values()) == {str(i) for i in range(10)}
    assert sum(len(part) for part in numbers.values()) == 10 and all(numbers.values())
    ids = [token for row in load_rows(tmp_path / "o", "train") for token in row["input_ids"]]
    assert result.train_tokens == len(ids)
    alone = prepare(
        DataSettings(source=_jsonl(tmp_path / "one.jsonl", documents[:1]), max_length=16),
        outline,
        1,
        tmp_path / "p",
    )
    assert alone.train_rows and alone.eval_rows and not alone.account.sides_equal


@pytest.mark.parametrize("too_long", ["auto", "drop", "cut_right", "cut_left", "split"])
def test_what_becomes_of_long_rows_is_a_setting(outline: Path, tmp_path: Path, too_long: Any) -> None:
    rows = [*_questions(10), {"question": "start " + "y " * 100, "answer": "blue"}]
    settings = DataSettings(
        source=_jsonl(tmp_path / "d.jsonl", rows), max_length=24, too_long=too_long, test_fraction=0
    )
    result = prepare(settings, outline, 1, tmp_path / "o")
    both = [row for split in ("train", "held_out") for row in load_rows(tmp_path / "o", split)]
    assert all(len(row["input_ids"]) == len(row["labels"]) <= 24 for row in both)
    tokenizer = load_tokenizer(outline / "model")
    long = [row for row in both if "blue" in tokenizer.decode(row["input_ids"])]
    if too_long in ("cut_left", "split"):
        # A piece of one token, the end, is nothing to learn from.
        learned = [sum(label != IGNORED for label in row["labels"]) for row in long]
        assert learned == ([2] if too_long == "cut_left" else [1])
        assert result.account.cut == 1 and result.account.used == 11 and not result.account.dropped
        return
    # What is cut from the right has no answer left.
    assert not long and len(both) == 10
    dropped = result.account.dropped[0]
    assert dropped.reason == "longer than data.max_length"
    assert ("nothing learned within the limit" in dropped.first) == (too_long == "cut_right")


def test_a_sources_own_splits_are_kept_and_its_test_rows_are_neither_trained_on_nor_chosen_by(
    outline: Path, tmp_path: Path
) -> None:
    _jsonl(tmp_path / "d" / "train.jsonl", _questions(10))
    _jsonl(tmp_path / "d" / "valid.jsonl", [*_questions(3, 20), *_questions(1)])
    _jsonl(tmp_path / "d" / "test.jsonl", [*_questions(2, 40), *_questions(1, 1), *_questions(1, 20)])
    result = prepare(DataSettings(source=str(tmp_path / "d")), outline, 1, tmp_path / "o")
    texts = {split: set(_texts(tmp_path / "o", outline, split)) for split in ("train", "held_out", "test")}
    numbers = {
        split: {int("".join(filter(str.isdigit, text))) for text in of_split}
        for split, of_split in texts.items()
    }
    assert numbers == {"train": set(range(2, 10)), "held_out": {0, 21, 22}, "test": {1, 20, 40, 41}}
    assert (result.train_rows, result.eval_rows, result.test_rows) == (8, 3, 4)
    assert {d.reason: d.rows for d in result.account.dropped} == {
        "equal to a held-out row of the source": 1,
        "equal to a test row of the source": 2,
    }
    assert result.account.files == {"train": 1, "held_out": 1, "test": 1}
    assert ("test", "4, kept apart: neither trained on nor chosen by") in facts(result)


def test_without_a_split_of_its_own_a_test_file_is_still_not_held_out(outline: Path, tmp_path: Path) -> None:
    _jsonl(tmp_path / "d" / "train.jsonl", _questions(10))
    _jsonl(tmp_path / "d" / "test.jsonl", _questions(5, 40))
    result = prepare(DataSettings(source=str(tmp_path / "d")), outline, 1, tmp_path / "o")
    assert (result.train_rows, result.eval_rows, result.test_rows) == (8, 2, 5)


@pytest.mark.parametrize("split_by", ["shuffle", "content"])
def test_equal_rows_stay_on_one_side_and_are_counted(outline: Path, tmp_path: Path, split_by: Any) -> None:
    rows = [{"prompt": "Same", "completion": "r"}, {"prompt": " same", "completion": "R"}] * 10
    rows += [{"prompt": f"q {i}", "completion": "r"} for i in range(8)]
    source = _jsonl(tmp_path / "d.jsonl", rows)
    result = prepare(DataSettings(source=source, split_by=split_by), outline, 1, tmp_path / "o")
    train, held_out, test = (
        {" ".join(text.lower().split()) for text in _texts(tmp_path / "o", outline, split)}
        for split in ("train", "held_out", "test")
    )
    assert not train & held_out and not test & (train | held_out) and (len(held_out), len(test)) == (5, 3)
    assert result.account.equal == 19 and result.account.used == 28
    exact = prepare(
        DataSettings(source=source, split_by=split_by, deduplicate="exact"), outline, 1, tmp_path / "e"
    )
    assert exact.train_rows + exact.eval_rows + exact.test_rows == 9 and exact.account.dropped[0].rows == 19
    assert not warning(exact)


def test_nearly_equal_rows_are_counted_with_the_first_and_stand_on_one_side(
    outline: Path, tmp_path: Path
) -> None:
    long = "the harbour of {} lies behind two hills and its ships bring salt , wool and copper from far away"
    rows = [{"prompt": f"about {name}", "completion": long.format(name) + " ." * again} for name in
            ("oslo", "cairo") for again in range(10)]  # fmt: skip
    rows += [{"prompt": f"number {i}", "completion": str(i * 7919)} for i in range(20)]
    source = _jsonl(tmp_path / "d.jsonl", rows)
    result = prepare(DataSettings(source=source, deduplicate="near"), outline, 1, tmp_path / "o")
    (dropped,) = result.account.dropped
    assert (dropped.reason, dropped.first) == ("nearly equal to an earlier row", f"{source}, row 2")
    sides = [_texts(tmp_path / "o", outline, side) for side in ("train", "held_out", "test")]
    assert sum("harbour" in text for side in sides for text in side) == 20 - dropped.rows <= 2
    assert sum("number" in text for side in sides for text in side) == 20
    assert f"{dropped.rows} nearly equal to an earlier row" in "\n".join(lines(result))


def test_rows_that_are_all_equal_are_said_to_be(outline: Path, tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "d.jsonl", [{"text": "mara likes red"}] * 10)
    result = prepare(DataSettings(source=source), outline, 1, tmp_path / "o")
    assert (result.train_rows, result.eval_rows) == (8, 2)
    assert "held-out rows are trained on, too" in "\n".join(lines(result))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": f"q {i}", "completion": ""} for i in range(24)], r"of 24 rows: 24 no answer \(first: .*row 1\)"),
        ([{"prompt": f"q {i} " * 300, "completion": "a"} for i in range(24)], r"data\.max_length.*24 of 24 rows are longer"),
        ([{"prompt": "q", "completion": "a"}], r"data\.eval_fraction"),
    ],
)  # fmt: skip
def test_where_nothing_is_left_the_true_reason_is_said(
    outline: Path, tmp_path: Path, rows: list[dict[str, str]], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        prepare(DataSettings(source=_jsonl(tmp_path / "d.jsonl", rows)), outline, 1, tmp_path / "o")


def test_where_the_source_brings_none_test_rows_are_ours(outline: Path, tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "d.jsonl", _questions(50))
    result = prepare(DataSettings(source=source, max_test_rows=4), outline, 1, tmp_path / "o")
    assert (result.train_rows, result.eval_rows, result.test_rows) == (36, 10, 4)
    texts = [_texts(tmp_path / "o", outline, side) for side in ("train", "held_out", "test")]
    assert [len(set(side)) for side in texts] == [36, 10, 4] and len(
        {t for side in texts for t in side}
    ) == 50
    asked = {answer["prompt"].removeprefix("<s>") for answer in result.answers}
    assert asked == {text.removesuffix(" red") for text in texts[1]}
    _jsonl(tmp_path / "f" / "train.jsonl", _questions(50))
    _jsonl(tmp_path / "f" / "validation.jsonl", _questions(9, 60))
    own = prepare(DataSettings(source=str(tmp_path / "f")), outline, 1, tmp_path / "p")
    assert (own.train_rows, own.eval_rows, own.test_rows) == (45, 9, 5)
    with pytest.raises(
        InputError, match=r"data\.test_fraction: '0\.9'.*of 50 rows, of which 10 are held out"
    ):
        prepare(DataSettings(source=source, test_fraction=0.9), outline, 1, tmp_path / "q")


def test_several_sources_are_mixed_by_their_weights_and_each_is_accounted_for(
    outline: Path, tmp_path: Path
) -> None:
    _jsonl(tmp_path / "a" / "train.jsonl", [*_questions(40), {"question": "x", "answer": ""}])
    _jsonl(tmp_path / "a" / "validation.jsonl", _questions(6, 100))
    b = _jsonl(tmp_path / "b.jsonl", [{"prompt": f"other {i}", "completion": "blue"} for i in range(40)])
    parts = [
        {"source": str(tmp_path / "a"), "weight": 1, "split": "train+validation"},
        {"source": b, "weight": 0.5},
    ]
    settings = DataSettings.model_validate({"sources": parts, "max_test_rows": 3})
    result = prepare(settings, outline, 1, tmp_path / "o")
    texts = {side: _texts(tmp_path / "o", outline, side) for side in ("train", "held_out", "test")}
    # All 46 rows of the first, the other's half of them.
    assert sum("who" in text for side in texts.values() for text in side) == 46
    assert sum("other" in text for side in texts.values() for text in side) == 23
    first, second = result.account.sources
    assert (first.source, first.weight, first.read) == (str(tmp_path / "a"), 1, 47)
    assert first.dropped == {"no answer": 1} and second.dropped == {"beyond their source's weight": 17}
    for part, word in ((first, "who"), (second, "other")):
        counted = {side: sum(word in text for text in of_side) for side, of_side in texts.items()}
        assert (part.train, part.held_out, part.test) == tuple(counted.values())
        assert part.read == part.train + part.held_out + part.test + sum(part.dropped.values())
    assert (
        result.source == f"{tmp_path / 'a'}, {b}" and result.layout == "question-answer and prompt-completion"
    )
    said = "\n".join(lines(result))
    assert f"source 2        {b}, weight 0.5: 40 rows, {second.train} trained on" in said
    assert "17 beyond their source's weight (first: " + b in said and not warning(result)
    parts[0]["split"] = "train"
    own = prepare(DataSettings.model_validate({"sources": parts}), outline, 1, tmp_path / "p")
    assert own.eval_rows == own.account.sources[0].held_out == 6


def test_the_split_is_the_seeds(outline: Path, tiny_rows: Path, tmp_path: Path) -> None:
    digests = [
        prepare(DataSettings(source=str(tiny_rows)), outline, seed, tmp_path / str(i)).digest
        for i, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_rows_stay_on_their_side_as_data_grows(outline: Path, tmp_path: Path) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(60)]

    def held_out(part: list[dict[str, str]], split_by: Any) -> set[str]:
        settings = DataSettings(
            source=_jsonl(tmp_path / "r.jsonl", part), split_by=split_by, eval_fraction=0.5, max_eval_rows=10
        )
        prepare(settings, outline, 1, tmp_path / "data")
        answers = PreparedRows.read(tmp_path / "data").answers
        return {answer["answer"] for answer in answers}

    before, after = held_out(rows[:40], "content"), held_out(list(reversed(rows)), "content")
    grown = {row["answer"] for row in rows[40:]}
    assert len(before) == len(after) == 10
    assert after - before <= grown, "no row that was trained on is held out later"
    assert held_out(rows, "shuffle") - held_out(rows[:40], "shuffle") - grown


def test_several_processes_render_the_same_rows_in_the_same_order(
    outline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _jsonl(tmp_path / "d.jsonl", _questions(1500))
    one = prepare(DataSettings(source=source), outline, 1, tmp_path / "one")
    monkeypatch.setattr("spectraqlora.data.preparing._ROWS_FOR_PROCESSES", 100)
    monkeypatch.setattr("spectraqlora.data.preparing.threads_per_process", lambda: 2)
    two = prepare(DataSettings(source=source), outline, 1, tmp_path / "two")
    assert two.model_dump() == one.model_dump()


def test_answers_are_there_however_many_rows_rendering_drops(outline: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{i} " + "y " * (300 if i % 20 else 1), "answer": f"a{i}"} for i in range(400)]
    settings = DataSettings(source=_jsonl(tmp_path / "d.jsonl", rows), max_length=64, max_eval_rows=5)
    result = prepare(settings, outline, 1, tmp_path / "o")
    assert result.eval_rows == len(result.answers) == 4
    assert all(answer["prompt"].split()[1] == answer["answer"][1:] for answer in result.answers)


def test_a_given_template_is_what_rows_and_questions_are_written_with(outline: Path, tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "again"), ("assistant", "bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [{"messages": [{**messages[0], "content": f"hi {i}"}, *messages[1:]]} for i in range(12)]
    settings = DataSettings(
        source=_jsonl(tmp_path / "d.jsonl", rows), chat_template="zephyr", train_on="last", packing="rows"
    )
    made = prepare(settings, outline, 1, tmp_path / "o")
    tokenizer = load_tokenizer(outline / "model")
    row = load_rows(tmp_path / "o", "train")[0]
    learned = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(learned) == "bye</s>"
    assert made.account.turns_without_labels == {"data.train_on=last": 12}
    assert made.answers[0]["prompt"].endswith("<|user|>\nagain</s>\n<|assistant|>\n")
    assert made.chat_template.startswith("{% for message in messages %}")
    assert (made.turn_ends, made.shared_sequences) == ([tokenizer.eos_token_id], True)
    with pytest.raises(InputError, match=r"data\.chat_template: 'chatml': .*'<\|im_end\|>'"):
        prepare(settings.model_copy(update={"chat_template": "chatml"}), outline, 1, tmp_path / "p")
