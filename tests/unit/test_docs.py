"""The READMEs: what code can write is as code writes it, links lead somewhere, and a reader finds the way in one hop."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import METHODS
from spectraqlora.runtime import command_line
from spectraqlora.runtime.images import step_names
from spectraqlora.settings import reference as settings_reference
from spectraqlora_pipelines import reference
from spectraqlora_pipelines.cli.app import app

ROOT = reference.ROOT
README = ROOT / "README.md"
LARGEST_README = 8 * 1024
DOCUMENTS = [*reference.readmes(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


class Link(NamedTuple):
    """A relative link of a document."""

    text: str
    target: Path
    anchor: str


def _prose(path: Path) -> str:
    """A document without its code, where brackets are no links."""
    text = re.sub(r"^(```.*?^```|(?: {4}|\t).*?)$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return text


def _links(path: Path) -> Iterator[Link]:
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", _prose(path)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield Link(text, (path.parent / file).resolve() if file else path, anchor)


def _headings(path: Path) -> dict[str, str]:
    """Anchors of a document's headings, as GitHub makes them, with the text below each."""
    parts = re.split(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    kept = re.compile(r"[^\w\- ]")
    return {
        kept.sub("", title).strip().lower().replace(" ", "-"): body
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("path", reference.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_generated_part_is_as_the_code_writes_it(path: Path) -> None:
    assert path.exists() and path.read_text(encoding="utf-8") == reference.current(path), "make docs"


def test_a_hand_written_part_outlives_the_generated_one() -> None:
    name = "step train"
    before = f"above\n<!-- generated: {name} -->\nstale\n<!-- end of {name} -->\nbelow, by hand\n"
    after = reference.renewed(before)
    assert after.startswith("above\n<!-- generated") and after.endswith("-->\nbelow, by hand\n")
    assert "stale" not in after and "# train" in after
    assert reference.renewed(after) == after


def test_a_marker_that_names_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="generated: 'magic': expected one of settings"):
        reference.renewed("<!-- generated: magic -->\n<!-- end of magic -->")


def test_the_first_screen_is_one_screen() -> None:
    assert README.stat().st_size <= LARGEST_README


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for link in _links(path):
        assert link.target.exists(), f"{link.text}: {link.target}"
        if link.anchor:
            assert link.anchor in _headings(link.target), f"{link.text}: #{link.anchor} in {link.target}"


def _one_hop() -> dict[Path, list[Link]]:
    """What the first screen links to."""
    hops: dict[Path, list[Link]] = {}
    for link in _links(README):
        hops.setdefault(link.target, []).append(link)
    return hops


@pytest.mark.parametrize("name", METHODS)
def test_from_the_first_screen_a_methods_file_is_one_hop_away(name: str) -> None:
    file = ROOT / "components" / "spectraqlora" / "methods" / reference.method_file(name)
    (link,) = _one_hop()[file]
    assert link.text == f"`{name}`"
    assert f'name = "{name}"' in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("step", step_names())
def test_from_the_first_screen_what_a_step_reads_is_one_hop_away(step: str) -> None:
    page = reference.step_readme(step)
    assert [link.text for link in _one_hop()[page]] == [step]
    inputs, outputs = (_rows(_headings(page)[part]) for part in ("inputs", "outputs"))
    options = command_line.options(command_line.component(step))
    written = ("output", "text")
    assert set(inputs) == {option.name for option in options if option.kind not in written}
    assert set(outputs) == {option.name for option in options if option.kind in written}


def _rows(text: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    return {row[0].strip("`"): row[1:] for row in cells[2:]}


def test_from_the_first_screen_how_to_add_a_step_is_one_hop_away() -> None:
    page = ROOT / "CONTRIBUTING.md"
    assert "add a step" in _line_of(README, "CONTRIBUTING.md")
    assert page in _one_hop()
    described = _headings(page)["add-a-step"]
    for part in ("component.py", "step.py", "@component", "artifacts.py", "make docs"):
        assert part in described


def _line_of(path: Path, words: str) -> str:
    return next(line for line in path.read_text(encoding="utf-8").splitlines() if words in line)


def test_a_steps_page_says_where_each_artifact_comes_from_as_the_pipelines_connect_them() -> None:
    inputs = _rows(_headings(reference.step_readme("train"))["inputs"])
    assert inputs["four_bit"][:2] == ["Model", "quantize-load.four_bit"]
    assert inputs["rows"][:2] == ["Dataset", "prepare-data.rows"]
    assert inputs["previous"][1] == "re-evaluate.next_adapter"
    assert inputs["start"][1] == "start-point.start_adapter"
    assert inputs["rank_map"][1] == (
        "re-evaluate.next_rank_map, select-layers.rank_map, start-point.start_rank_map"
    )


def test_no_step_receives_weights_that_its_page_does_not_name() -> None:
    for step in step_names():
        inputs = _rows(_headings(reference.step_readme(step))["inputs"])
        named = {name: set(row[1].split(", ")) for name, row in inputs.items() if row[1] != "–"}
        connected = reference.edges().get(step, {})
        assert {name: named[name] for name in connected} == connected


def test_every_setting_has_its_row() -> None:
    text = (ROOT / "pipelines" / "README.md").read_text(encoding="utf-8")
    for key, default, meaning in settings_reference():
        assert f"| `{key}` | `{default}` | {meaning} |" in text


def _commands(path: Path) -> Iterator[list[str]]:
    """The words of every `spectraqlora …` in a document's code, lines that go on joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    code = [line for line in text.splitlines() if line.startswith("    ")]
    code += re.findall(r"`([^`\n]+)`", text)
    for line in code:
        command = line.strip().partition(" #")[0]
        if command.startswith("spectraqlora "):
            yield shlex.split(command.replace("…", "x"), comments=True)[1:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_a_document_shows_exists_with_its_options(path: Path) -> None:
    for words in _commands(path):
        command: Any = typer.main.get_command(app)
        rest = list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            name = rest.pop(0)
            known = command.commands
            if name not in known and getattr(command, "invoke_without_command", False):
                break
            assert name in known, f"{path}: spectraqlora {' '.join(words)}"
            command = known[name]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert given <= options, f"{path}: spectraqlora {' '.join(words)}: {given - options}"


def test_every_promise_about_security_names_tests_that_there_are() -> None:
    page = (ROOT / "components" / "spectraqlora" / "README.md").read_text(encoding="utf-8")
    body = page.split("## Who is trusted with what")[1].split("\n## ")[0]
    named = set(re.findall(r"`(test_\w+)`", body))
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named and {name for name in named if f"def {name}(" not in code} == set()
