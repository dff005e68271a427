"""The report: everything a reader looks for, self-contained, and safe against whatever is in names and rows."""

import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from spectraqlora.artifacts import (
    Evaluation,
    LinearModule,
    ModelOutline,
    ModuleRank,
    PreparedRows,
    SideOverlap,
    Similarity,
)
from spectraqlora.report.page import EXAMPLE_CHARACTERS, render_report
from spectraqlora.report.plots import draw, write_plots
from spectraqlora.snr.table import COLUMNS
from spectraqlora.steps.compare.leaderboard import against_best, order_by_loss, winning_method

from tests.unit.results import evaluation

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
MARKUP = "<script>alert('1')</script>"
SETTINGS = {"select": {"rank": 4, "budget": 0.5}, "evaluate": {}, "snr": {"source": "original"}}
ESCAPED = "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;"


def _table(kind: str = "mlp.up_proj") -> pd.DataFrame:
    rows = [dict.fromkeys(COLUMNS, 1.0) for _ in range(2)]
    for layer, row in enumerate(rows):
        row.update(module=NAMES[layer], layer=layer, type=kind, source="original")
    rows[1]["snr"] = float("inf")
    return pd.DataFrame(rows)


def _outline(**changes: object) -> ModelOutline:
    values = {
        "source": "org/model",
        "revision": "main",
        "source_path": "",
        "base_digest": "b" * 64,
        "compute_dtype": "float32",
        "parameters": 1_200_000,
        "modules": [],
    }
    return ModelOutline(**(values | changes))


def _rows(**changes: object) -> PreparedRows:
    values = {
        "source": "faq.jsonl",
        "digest": "d" * 64,
        "layout": "question-answer",
        "train_rows": 1234,
        "eval_rows": 2,
        "train_tokens": 56_789,
        "account": {
            "files": {"train": 1},
            "unused_files": [],
            "read": 1243,
            "used": 1236,
            "dropped": [
                {"reason": "no answer", "rows": 3, "first": "faq.jsonl, row 7"},
                {
                    "reason": "longer than data.max_length",
                    "rows": 400,
                    "first": "faq.jsonl, row 9",
                    "setting": "data.max_length",
                },
            ],
            "unused_columns": ["id"],
            "turns_without_labels": {},
            "left_out": {},
            "tokens_read": 60_000,
            "tokens_learned": 20_000,
            "max_length": 512,
            "lengths": [40, 90, 200, 700],
        },
        "examples": [
            [("Question: Who?\nAnswer:", False), (" Ada</s>", True)],
            [("Question: <b>?\nAnswer: a long story", False)],
        ],
        "answers": [{"prompt": "<s>Question: Who?\nAnswer:", "answer": "Ada"}],
    }
    return PreparedRows(**(values | changes))


@pytest.fixture(scope="module")
def branches() -> list[Evaluation]:
    similarity = Similarity(modules=NAMES, cosines=[[1.0, 0.8], [0.8, 1.0]], groups=[NAMES])
    return [
        evaluation("sgm", [1.0, 2.0], 10, similarity=similarity, settings=SETTINGS),
        evaluation("qlora", [2.0, 3.0], 20, accuracy=None),
    ]


def _page(
    branches: list[Evaluation],
    winner: str = "sgm",
    table: pd.DataFrame | None = None,
    outline: ModelOutline | None = None,
    rows: PreparedRows | None = None,
    pictures: dict[str, str] | None = None,
) -> str:
    known = (_table() if table is None else table, outline or _outline(), rows or _rows())
    return render_report(branches, *known, winner, against_best(branches), pictures)


@pytest.fixture(scope="module")
def page(branches: list[Evaluation]) -> str:
    return _page(branches)


def test_the_page_shows_every_part(page: str) -> None:
    for words in (
        "Leaderboard",
        "Data",
        "Signal-to-noise",
        "Where each method trained",
        "whose gradients agree",
        "Cost",
        "Rounds",
        "Settings and digests",
    ):
        assert f">{words}" in page or f" {words}" in page
    assert re.sub(r"\s+", " ", page).count("2 candidates; groups that share A") == 1
    assert "∞" in page
    assert page.count("<svg") == 6
    for key, value in (
        ("select.rank", "4"),
        ("select.budget", "0.5"),
        ("snr.source", "original"),
        ("train.max_steps", "2"),
    ):
        assert f"<tr><th>{key}</th><td><code>{value}</code></td></tr>" in page
    assert "b" * 64 in page and "d" * 64 in page


def test_the_leaderboard_has_a_row_for_the_base_and_marks_the_winner(page: str) -> None:
    board = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = re.findall(r'<tr(?: class="(\w+)")?><td><span class="dot"[^>]*></span>([^<]+)</td>', board)
    assert rows == [("base", "base (4-bit)"), ("winner", "sgm"), ("", "qlora")]
    assert "1.5000 ± 0.1000" in board and "-62.5%" in board and "4.0000" in board


def test_the_page_says_what_decided_the_ties_by_the_numbers_that_the_winner_was_chosen_by() -> None:
    """A branch within noise and one beyond it, next to a control that is better than any that can win."""
    losses = [2.0, 3.0, 1.0, 2.5, 1.5, 2.2]
    worse = [x + 0.5 + 0.01 * i for i, x in enumerate(losses)]
    chance = [x - 0.2 + 0.01 * i for i, x in enumerate(losses)]
    branches = order_by_loss(
        [
            evaluation("qlora", losses, 20),
            evaluation("hybrid", [2.4, 2.8, 1.3, 2.2, 1.9, 2.0], 10),
            evaluation("alors", worse, 5),
            evaluation("random", chance, 10),
        ]
    )
    page = _page(branches, winning_method(branches))
    board = re.sub(r"<[^>]+>", "|", page[page.index("<tbody>") : page.index("</tbody>")])
    tests = against_best(branches)
    assert {name for name, test in tests.items() if test.tied} == {"qlora", "hybrid"}
    flat = re.sub(r"\s+", " ", board)
    for name, test in tests.items():
        shown = f"{test.difference:+.4f} ± {test.stderr:.4f}" + (", tied" if test.tied else "")
        assert (f"|{shown}|" in flat) == (name != "qlora"), name
    note = re.sub(r"\s+", " ", page)
    assert "p ≥ 0.05; of those that are tied the one that trains the fewest parameters wins" in note
    assert "random is a control, compared and never the winner" in note
    assert "<b>hybrid</b> won" in page


def test_where_there_are_test_rows_the_page_says_that_they_choose_nothing(branches: list[Evaluation]) -> None:
    assert "test rows" not in _page(branches)
    page = _page([b.model_copy(update={"base_test_loss": 3.5}) for b in branches], rows=_rows(test_rows=1200))
    note = re.sub(r"\s+", " ", page)
    assert "The 1,200 test rows choose nothing: the base's loss on them is 3.5000" in note


def test_the_data_block_says_what_was_trained_on_and_what_was_dropped_and_why(page: str) -> None:
    block = re.sub(r"\s+", " ", page[page.index("<h2>Data") : page.index("<h2>Loss")])
    assert "faq.jsonl, layout question-answer" in block
    assert (
        "1,243 rows" in block and "1,234 rows, 56,789 tokens" in block and "2, 1 with a short answer" in block
    )
    assert "3 no answer (first: faq.jsonl, row 7)" in block
    assert "400 longer than data.max_length; data.max_length keeps them (first: faq.jsonl, row 9)" in block
    assert "20,000 of 60,000 tokens read (33%)" in block and "<td>id</td>" in block
    assert "403 of 1,243 rows are lost (32%)" in block


def test_an_example_marks_what_the_loss_counts(page: str) -> None:
    assert "<pre>Question: Who?\nAnswer:<mark> Ada&lt;/s&gt;</mark></pre>" in page
    assert "<pre>Question: &lt;b&gt;?\nAnswer: a long story</pre>" in page


def test_a_long_example_is_cut(branches: list[Evaluation]) -> None:
    rows = _rows(examples=[[("a", False), ("x" * 9999, True), ("never", False)]])
    page = _page(branches, rows=rows, pictures=draw(branches, _table(), "sgm"))
    assert f"<pre>a<mark>{'x' * (EXAMPLE_CHARACTERS - 1)} …</mark></pre>" in page


class _Elements(HTMLParser):
    """The names and attributes of a page's elements, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_what_comes_from_models_data_and_settings_is_text_and_never_markup(
    branches: list[Evaluation], page: str
) -> None:
    moved = [b.model_copy(deep=True) for b in branches]
    moved[0].rounds[0].changes = [MARKUP]
    rows = _rows(
        source=MARKUP,
        layout=MARKUP,
        examples=[[(MARKUP, False), (MARKUP, True)]],
        answers=[{"prompt": MARKUP, "answer": MARKUP}],
    )
    outline = _outline(source=MARKUP, revision=MARKUP, compute_dtype=MARKUP)
    moved[0].settings = {"snr": {"table": MARKUP}, MARKUP: {'"onload=': '"onload='}}
    hostile = _page(moved, table=_table(MARKUP), outline=outline, rows=rows)
    before, after = _Elements(page), _Elements(hostile)
    assert after.names == before.names and after.attributes == before.attributes
    # Title, lead, base model and revision and type, data source and layout, two examples, a change, two settings.
    assert hostile.count(ESCAPED) >= 12
    assert f"<pre>{ESCAPED}<mark>{ESCAPED}</mark></pre>" in hostile


def test_a_dollar_in_a_name_is_no_formula(branches: list[Evaluation]) -> None:
    assert "$\\broken$" in draw(branches, _table("$\\broken$"), "sgm")["snr"]


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    for reference in ('src="http', 'href="http', "<script", "<link", "url(http", "@import"):
        assert reference not in page


def test_the_same_evaluations_give_the_same_page(branches: list[Evaluation], page: str) -> None:
    assert _page(branches) == page


def test_the_pictures_are_files_too(branches: list[Evaluation], tmp_path: Path) -> None:
    write_plots(draw(branches, _table(), "sgm"), tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(written) == {"loss.svg", "snr.svg", "ranks.svg", "cost.svg", "similarity.svg", "groups.svg"}
    assert all(text.startswith("<svg") for text in written.values())


def test_groups_by_subspace_show_both_sides_and_what_they_save(branches: list[Evaluation]) -> None:
    names = [f"model.layers.{layer}.mlp.{kind}" for layer in (0, 1) for kind in ("up_proj", "down_proj")]
    sides = [
        SideOverlap(side=side, modules=names[start::2], overlaps=[[1.0, 0.5], [0.5, 1.0]], chance=0.08)
        for start, side in enumerate(("input", "output"))
    ]
    outline = _outline(
        modules=[
            LinearModule(
                module=name, type=f"mlp.{name.split('.')[-1]}", layer=int(name.split(".")[2]),
                out_features=(96, 32)["down" in name], in_features=(32, 96)["down" in name], four_bit=True,
            )
            for name in names
        ]
    )  # fmt: skip
    merging = branches[0].model_copy(deep=True)
    merging.similarity = Similarity(
        modules=names, groups=[names[::2], names[1::2]], sides=sides, threshold=0.3
    )
    rank_map = merging.rounds[0].rank_map
    rank_map.modules = [
        ModuleRank(
            module=name, type="t", layer=0, tier="selected", rank=4, alpha=8.0,
            group=index % 2, shared=("A", "B")[index % 2],
        )
        for index, name in enumerate(names)
    ]  # fmt: skip
    page = " ".join(_page([merging, branches[1]], outline=outline).split())
    assert "4 candidates; groups that share A: 1, B: 1, both: 0; modules in them: 4." in page
    # Four adapters of rank 4 on 128 numbers each; each of two groups saves 4 x 32.
    assert "trains 1,792 parameters" in page and "would have 2,048 (-12.5%)" in page
    drawn = draw([merging, branches[1]], _table(), "sgm")
    assert "input side, chance 0.08" in drawn["similarity"]
    assert "output side, chance 0.08" in drawn["similarity"]
    assert "A·g0" in drawn["groups"]


def test_the_wheel_and_the_images_carry_the_template(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("components", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("spectraqlora-*.whl")
    assert "spectraqlora/report/page.html.j2" in zipfile.ZipFile(wheel).namelist()
    assert "COPY components/spectraqlora " in (ROOT / "images" / "light" / "Dockerfile").read_text()
    assert re.search(r"^jinja2==", (ROOT / "images" / "light" / "requirements.lock").read_text(), re.M)
