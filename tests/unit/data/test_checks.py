"""What is refused before a run, with the model's own tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.data.checks import check_sources
from spectraqlora.data.for_model import RowModel, row_model
from spectraqlora.errors import InputError
from spectraqlora.places import base_place, data_place
from spectraqlora.settings import DataSettings, parse
from spectraqlora_pipelines.local import preflight

REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def check(source: str, model: RowModel | None = None, **settings: Any) -> list[str]:
    return check_sources([data_place(source)], DataSettings(**settings), model)


@pytest.fixture(scope="module")
def refusing(tiny_model: Path) -> RowModel:
    """A model whose template refuses the system role."""
    model = row_model(tiny_model, DataSettings())
    model.tokenizer.chat_template = REFUSING
    # The renderer has looked at the tokenizer already.
    from spectraqlora.data.rendering import Renderer

    return RowModel(model.tokenizer, Renderer(model.tokenizer, "{prompt}"), 64, False)


def test_good_data_passes(tmp_path: Path, tiny_model: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", [{"prompt": f"q {i}", "completion": "a"} for i in range(10)])
    assert check(source, row_model(tiny_model, DataSettings())) == []


def test_bad_data_is_refused_with_one_line(tmp_path: Path) -> None:
    good = [{"text": f"a {i}"} for i in range(3)]
    (tmp_path / "n.csv").write_text("question,answer\n")
    (tmp_path / "p.parquet").write_text("no parquet")
    (tmp_path / "l.jsonl").write_bytes(b'{"text": "\xff"}\n')
    cases: list[tuple[str, dict[str, Any], str]] = [
        (jsonl(tmp_path / "c.jsonl", [{"a": "1"}]), {}, r"data\.columns=\{text: a\}"),
        (jsonl(tmp_path / "f.jsonl", good), {"eval_fraction": 0.01}, r"data\.eval_fraction"),
        (jsonl(tmp_path / "m.jsonl", good), {"max_rows": 1}, r"data\.eval_fraction"),
        (str(tmp_path / "n.csv"), {}, "it has none"),
        (str(tmp_path / "p.parquet"), {}, "readable Parquet"),
        (str(tmp_path / "l.jsonl"), {}, "line 1.*UTF-8"),
        (
            jsonl(tmp_path / "e.jsonl", [{"prompt": "q", "completion": ""}] * 24),
            {},
            r"24 no answer \(first: .*row 1\)",
        ),
        (jsonl(tmp_path / "b.jsonl", [*good, {"text": True}]), {}, "b.jsonl, row 4, text"),
        (jsonl(tmp_path / "k.jsonl", [{"messages": CHAT, "label": False}]), {}, r"data\.preference"),
    ]
    for source, settings, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            check(source, **settings)
        assert "\n" not in str(caught.value), source


def test_a_validation_split_needs_no_share_of_the_training_rows(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert check(str(tmp_path), eval_fraction=0.01) == []


def test_what_the_template_says_stands_in_the_refusal_with_the_row(
    tmp_path: Path, refusing: RowModel
) -> None:
    system = {"role": "system", "content": "Be short."}
    bad = [{"messages": [system, *CHAT]}] * 6
    with pytest.raises(InputError, match="System role not supported") as refused:
        check(jsonl(tmp_path / "d.jsonl", bad), refusing)
    assert "d.jsonl, row 1" in str(refused.value) and "\n" not in str(refused.value)
    # One pattern among others is said, however late it comes, and its rows will be dropped.
    mixed = jsonl(tmp_path / "m.jsonl", [*[{"messages": CHAT}] * 500, *bad])
    said = check(mixed, refusing)
    assert len(said) == 1 and "row 501" in said[0] and "System role not supported" in said[0]


def test_a_run_is_refused_before_its_first_step(tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    base = tmp_path / "model"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").write_text(REFUSING)
    system = {"role": "system", "content": "Be short."}
    source = jsonl(tmp_path / "d.jsonl", [{"messages": [system, *CHAT]}] * 24)
    settings = parse({"select": {"rank": 8, "rank_high": 8, "rank_low": 4}, "methods": "hybrid"})
    with pytest.raises(InputError, match="System role not supported"):
        preflight.check(settings, base_place(str(base)), [data_place(source)])
