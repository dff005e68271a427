"""Everything that differs between methods is asked of the catalogue, and a new one touches three places."""

import ast
import re
import tokenize
from pathlib import Path

import pytest
import spectraqlora
import spectraqlora_pipelines
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import METHODS, check_methods, method, moving, names
from spectraqlora.settings import Settings, parse
from spectraqlora.steps.compare.component import compare
from spectraqlora_pipelines.cli.options import load_settings
from spectraqlora_pipelines.dags.catalogue import dag
from spectraqlora_pipelines.dags.placement import Placement

COMPONENTS, PIPELINES = (Path(package.__file__).parent for package in (spectraqlora, spectraqlora_pipelines))
COMPARE = COMPONENTS / "steps" / "compare" / "component.py"
SOURCES = [p for root in (COMPONENTS, PIPELINES) for p in root.rglob("*.py")]


def test_every_method_says_what_it_is() -> None:
    for name, chosen in METHODS.items():
        assert chosen.name == name and re.fullmatch("[a-z][a-z0-9_]*", name)
        assert len(chosen.summary) > 20 and re.fullmatch("#[0-9a-f]{6}", chosen.colour)
        assert chosen.moves == hasattr(chosen, "next_ranks")
    assert len({chosen.colour for chosen in METHODS.values()}) == len(METHODS)
    assert {name for name, chosen in METHODS.items() if chosen.moves} == {"hybrid", "alors"}
    assert {name for name, chosen in METHODS.items() if chosen.control} == {"qlora_half", "random"}


@pytest.mark.parametrize(
    ("settings", "measuring"),
    [
        ({"signal": "spectrum"}, {"sgm"}),
        ({"signal": "energy"}, {"sgm", "hybrid", "alors", "qlora_half"}),
        ({"signal": "combined", "gradient_init": "off"}, {"sgm", "hybrid", "alors", "qlora_half"}),
        ({"signal": "spectrum", "gradient_init": "on"}, set(METHODS)),
    ],
)
def test_gradients_are_measured_for_those_who_need_them(settings: dict, measuring: set[str]) -> None:
    select = parse({"select": settings}).select
    assert {name for name in names() if method(name).measures_gradients(select)} == measuring


def test_unknown_methods_are_refused_where_settings_are_loaded_and_where_a_dag_is_built() -> None:
    known = "expected 'qlora', 'hybrid', 'alors', 'sgm', 'qlora_half' or 'random'"
    with pytest.raises(InputError, match=rf"^methods\.1: 'magic': {known}$"):
        load_settings(None, {"methods": "qlora,magic"}, [])
    with pytest.raises(InputError, match=rf"^retrain\.method: 'magic': {known}$"):
        load_settings(None, {}, ["retrain.method=magic"])
    with pytest.raises(InputError, match=rf"^methods\.0: 'magic': {known}$"):
        dag("ablation", parse({"methods": "magic"}), Placement())
    assert check_methods(Settings()) == Settings()


def test_methods_that_never_move_are_refused_a_next_round() -> None:
    assert moving("hybrid") is METHODS["hybrid"]
    with pytest.raises(
        InputError, match=r"^method: 'qlora': expected 'hybrid' or 'alors', whose rank map moves"
    ):
        moving("qlora")


def _named(path: Path) -> list[str]:
    """Texts in a source file that are a method's name, outside of defaults of settings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defaults: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Field" and node.args:
            defaults.update(ast.walk(node.args[0]))
    return [
        f"{path}:{node.lineno}: {node.value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in METHODS and node not in defaults
    ]


def test_no_other_package_names_a_method() -> None:
    others = [p for p in SOURCES if p.parent != COMPONENTS / "methods" and p != COMPARE]
    assert len(others) > 100
    assert [line for path in others for line in _named(path)] == []


def test_a_comparison_with_a_methods_name_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    for line in ('x == "sgm"', 'x in ("hybrid", "other")', '{"alors": 1}[x]', 'FIXED = ["random"]'):
        source.write_text(f"x = 1\n{line}\n")
        assert len(_named(source)) == 1, line
    source.write_text('Field(("qlora", "hybrid"), description="Branches")')
    assert _named(source) == []


def test_a_new_method_touches_its_file_the_catalogue_and_compares_parameters() -> None:
    """Whatever else names all of today's methods would have to name the new one too."""
    parameters = {*names(), *(f"{name}_adapter" for name in names())}
    assert parameters <= compare.component_spec.inputs.keys()
    words = {path: _identifiers(path) for path in SOURCES}
    naming_all = {path for path, used in words.items() if used >= parameters}
    assert naming_all == {COMPARE}
    files = {type(chosen).__module__.rpartition(".")[2] for chosen in METHODS.values()}
    listing_all = {path for path, used in words.items() if used >= files}
    assert listing_all == {COMPONENTS / "methods" / "catalogue.py"} and len(files) == len(METHODS)


def _identifiers(path: Path) -> set[str]:
    """Names in a source file's code, without its texts and comments."""
    with path.open("rb") as file:
        return {token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME}
