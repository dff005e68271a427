"""Every table in the READMEs that code can write: `make docs` writes them, a test compares.

So it does the part of the chart's schema that says what settings and values file take.

A README has such a table between two comments, and everything outside of them is written by hand:

    <!-- generated: settings -->
    <!-- end of settings -->

The name says which function of this module writes it; a word behind the name is its argument. A step without a
README gets one.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import METHODS
from spectraqlora.runtime import command_line
from spectraqlora.runtime.images import images, own_image, step_names
from spectraqlora.settings import Settings, parse
from spectraqlora.settings import reference as settings_reference

from spectraqlora_pipelines.cluster.credentials import NEEDED, Credential
from spectraqlora_pipelines.cluster.values import ClusterValues
from spectraqlora_pipelines.cluster.values import reference as values_reference

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "spectraqlora"
PACKAGE = ROOT / "components" / "spectraqlora"
STEPS = PACKAGE / "steps"
Sources = dict[str, set[str]]
"""By input artifact: the outputs it comes from, as `step.output`."""
_SECTION = "_settings"
_LONGEST_LINE = 110
_NOT_OURS = {".venv", "build", "node_modules", "runs"}
_BLOCK = re.compile(r"<!-- generated: ([\w ./-]+) -->\n(.*?)<!-- end of \1 -->", re.DOTALL)


def readmes() -> list[Path]:
    """All README.md of the repository, whether they have something generated or not."""
    paths = (path for path in sorted(ROOT.rglob("README.md")))
    return [
        path
        for path in paths
        if not any(part in _NOT_OURS or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def documents() -> list[Path]:
    """Every README with a generated part, there or not yet there."""
    ours = {path for path in readmes() if _BLOCK.search(path.read_text(encoding="utf-8"))}
    return sorted(ours | {step_readme(step) for step in step_names()})


def current(path: Path) -> str:
    """A README of `documents` as it should be: what is generated anew, what is written by hand as it is."""
    if path.exists():
        return renewed(path.read_text(encoding="utf-8"))
    name = f"step {path.parent.name.replace('_', '-')}"
    return renewed(f"<!-- generated: {name} -->\n<!-- end of {name} -->\n")


def renewed(text: str) -> str:
    """A document with everything between its markers written anew, and the rest as it is.

    Raises:
        InputError: a marker names nothing that this module writes.
    """

    def write(match: re.Match[str]) -> str:
        name, _, argument = match[1].partition(" ")
        if name not in GENERATED:
            raise InputError("generated", match[1], f"one of {', '.join(GENERATED)}")
        body = GENERATED[name](*argument.split())
        return f"<!-- generated: {match[1]} -->\n{body}\n<!-- end of {match[1]} -->"

    return _BLOCK.sub(write, text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [list(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(rows: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    for key, default, meaning in rows:
        yield f"`{key}`", f"`{default}`", meaning


def settings() -> str:
    """Every setting with its default."""
    return table(("setting", "default", "meaning"), _code(settings_reference()))


def cluster_values() -> str:
    """Every key of the values file of `compile --target kubernetes`."""
    return table(("key", "default", "meaning"), _code(values_reference()))


def chart_values() -> str:
    """Every value of the chart: keys and meanings from values.schema.json, defaults from values.yaml."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return table(("value", "default", "meaning"), _code(chart_rows(schema, values)))


def chart_rows(schema: dict[str, Any], values: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every value of the chart; a key without default has none."""
    for name, part in schema["properties"].items():
        key = f"{prefix}{name}"
        if name not in values:
            continue
        if "properties" in part and isinstance(values[name], dict) and values[name]:
            yield from chart_rows(part, values[name], f"{key}.")
        else:
            yield key, json.dumps(values[name]), part["description"]


def chart_schema() -> str:
    """values.schema.json with what settings and values file take, so that helm refuses what they refuse."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    _, made = models_json_schema(
        [(Settings, "validation"), (ClusterValues, "validation")],
        ref_template="#/definitions/{model}",
        schema_generator=_HelmSchema,
    )
    definitions = made["$defs"]
    definitions["ClusterValues"]["properties"]["steps"]["propertyNames"] = {"enum": list(step_names())}
    given = schema["properties"]["pipeline"]["properties"]
    for key, model in (("settings", "Settings"), ("values", "ClusterValues")):
        described = given[key]["description"]
        given[key] = {
            "description": described,
            "type": "object",
            "allOf": [{"$ref": f"#/definitions/{model}"}],
        }
    schema["definitions"] = dict(sorted(definitions.items()))
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


class _HelmSchema(GenerateJsonSchema):
    """The JSON schema of what is accepted, and not of what it becomes; without defaults and titles.

    Values are given as YAML, where `on` is true and 2 is a number: what is turned into text may be one as well.
    """

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        inner = self.generate_inner(schema["schema"])
        if inner.get("type") == "string":
            return {"anyOf": [inner, {"type": ["boolean", "number"]}]}
        return {"anyOf": [inner, {"type": "string"}]} if inner.get("type") == "array" else inner

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        # `helm --set` makes a text of every number with a point.
        text = {"type": "string", "pattern": r"^-?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$"}
        return {"anyOf": [super().float_schema(schema), text]}

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def methods(folder: str) -> str:
    """The methods, each with a link to its file.

    Args:
        folder: of the methods' files, as seen from the README.
    """
    rows = (
        (f"[`{name}`]({_in(folder, method_file(name))})", entry.summary) for name, entry in METHODS.items()
    )
    return table(("method", "what it does"), rows)


def method_file(name: str) -> str:
    """Name of the file that holds a method."""
    return f"{type(METHODS[name]).__module__.rpartition('.')[2]}.py"


def packages() -> str:
    """The packages and modules of spectraqlora in the order of the layers contract, as their docstrings say."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in contracts["contracts"] if contract["type"] == "layers")
    rows = []
    for level in layers:
        for name in level.split(" | "):
            _, _, inside = name.partition("spectraqlora.")
            if inside:
                rows.append(_package(inside))
    return table(("package", "what it holds"), rows)


def _package(name: str) -> tuple[str, str]:
    module = PACKAGE / f"{name}.py"
    if not module.exists():
        module = PACKAGE / name / "__init__.py"
    meaning = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    readme = PACKAGE / name / "README.md"
    shown = f"`{name}`" if module.name == "__init__.py" else f"`{module.name}`"
    linked = f"[{shown}]({name}/README.md)" if readme.exists() else shown
    return linked, meaning.partition("\n\n")[0].replace("\n", " ").rstrip(".")


def steps(folder: str) -> str:
    """The steps in the order of the way of the data, each with a link to its README.

    Args:
        folder: of the steps, as seen from the README.
    """
    rows = (
        (f"[{step}]({_in(folder, step.replace('-', '_'))}/README.md)", _summary(step), f"`{own_image(step)}`")
        for step in _in_order()
    )
    return table(("step", "what it does", "image"), rows)


def step_images() -> str:
    """The images and the steps that run in each."""
    return table(("image", "steps"), ((f"`{name}`", ", ".join(inside)) for name, inside in images().items()))


def step_credentials() -> str:
    """Which step is given whose credentials, and for what."""
    kinds = list(Credential)
    rows = ((f"`{step}`", *(NEEDED[step].get(kind, "–") for kind in kinds)) for step in _in_order())
    return table(("step", *kinds), rows)


def sizes() -> str:
    """GPU memory of the steps for common model sizes, GiB, as `spectraqlora plan` computes it.

    Default settings but for rows of 2,048 tokens, 4 at a time, and 1 calibration row at a time.
    """
    from spectraqlora.planning.shape import ModelShape, config_of
    from spectraqlora.planning.steps import plan

    settings = parse(
        {
            "data": {"max_length": 2048},
            "train": {"batch_size": 4, "gradient_accumulation": 2},
            "evaluate": {"batch_size": 4},
            "select": {"calibration_rows": 1},
        }
    )
    others = ("measure-base", "re-evaluate", "merge-export")
    rows = []
    for name in ("7B", "13B", "65B", "70B"):
        shape = ModelShape(config_of(name), "bfloat16")
        needs = plan(shape, settings, cuda=True).steps
        taken = [
            max(s.device for s in needs if s.method == m and s.step == "train") for m in settings.methods
        ]
        taken += [max(s.device for s in needs if s.step == other) for other in others]
        rows.append((name, *(f"{size / 2**30:.0f}" for size in (shape.weight_bytes, *taken))))
    head = ("model", "4-bit weights", *(f"train ({method})" for method in settings.methods), *others)
    return table(head, rows)


def step(name: str) -> str:
    """A step's README, from its component."""
    function = command_line.component(name)
    described = command_line.options(function)
    connected = edges().get(name, {})
    artifacts = [option for option in described if option.kind == "input"]
    parameters = [option for option in described if not option.artifact and option.kind != "text"]
    inputs = [(option, ", ".join(sorted(connected.get(option.name, ["–"])))) for option in artifacts]
    inputs += [(option, _default(option)) for option in parameters]
    outputs = [option for option in described if option.kind in ("output", "text")]
    parts = [
        f"# {name}",
        command_line.summary(function),
        f"Image `{own_image(name)}`; interface [component.py](component.py), "
        "from artifacts to a typed call [step.py](step.py).",
        "## Inputs",
        table(
            ("input", "type", "from, or default", "meaning"),
            ((f"`{option.name}`", _kind(option), origin, option.help) for option, origin in inputs),
        ),
        "## Outputs",
        table(
            ("output", "type", "meaning"),
            ((f"`{option.name}`", _kind(option), option.help) for option in outputs),
        ),
    ]
    sections = [option.name for option in parameters if option.name.endswith(_SECTION)]
    if sections:
        parts += ["## Settings", _sections(sections)]
    return "\n\n".join([*parts, "## By hand", f"{_example(name)}\n"])


def step_readme(name: str) -> Path:
    """Where a step's README is."""
    return STEPS / name.replace("-", "_") / "README.md"


def _kind(option: command_line.Option) -> str:
    return option.artifact.__name__ if option.artifact else option.kind


def _default(option: command_line.Option) -> str:
    if option.name.endswith(_SECTION):
        return "the section's"
    return "required" if option.required else f"`{json.dumps(option.default)}`"


def _example(name: str) -> str:
    """The step's command line as an indented block, an option a line where it is long."""
    line = f"    python -m spectraqlora {command_line.example(name)}"
    return line if len(line) <= _LONGEST_LINE else line.replace(" --", " \\\n      --")


def _sections(parameters: list[str]) -> str:
    defaults, lines = Settings(), []
    for parameter in parameters:
        section = parameter.removesuffix(_SECTION)
        keys = ", ".join(f"`{key}`" for key in type(getattr(defaults, section)).model_fields)
        lines.append(f"- `{parameter}`: the section `{section}` with {keys}")
    shared = "JSON objects; what is left out keeps its default. [All settings](../../../../pipelines/README.md#settings)."
    return "\n".join([shared, "", *lines])


def _summary(name: str) -> str:
    return (
        command_line.summary(command_line.component(name)).partition("\n\n")[0].replace("\n", " ").rstrip(".")
    )


def _in(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


@functools.cache
def edges(rounds: int = 2) -> dict[str, Sources]:
    """By step and input artifact: the outputs that a pipeline connects to it, as `step.output`.

    Of the pipelines with all methods, from original and 4-bit weights, and of a retraining that starts from the
    champion: with two rounds they have every task and every edge that some run has.
    """
    connected: dict[str, Sources] = {}
    for spec in _specifications(rounds):
        for task, sources in _Walk(spec["components"]).tasks(spec["root"]["dag"], {}):
            for name, outputs in sources.items():
                connected.setdefault(task, {}).setdefault(name, set()).update(outputs)
    return connected


def _specifications(rounds: int) -> Iterator[dict[str, Any]]:
    from google.protobuf.json_format import MessageToDict

    from spectraqlora_pipelines.dags import catalogue
    from spectraqlora_pipelines.dags.placement import Placement

    given = {"methods": list(METHODS), "rounds": rounds, "retrain": {"start": "champion"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, source in (("ablation", "original"), ("ablation", "quantized"), ("retraining", "original")):
            settings = parse({**given, "snr": {"source": source}})
            pipeline = catalogue.dag(catalogue.checked(name), settings, Placement())
            yield MessageToDict(pipeline.pipeline_spec)


class _Walk:
    """Follows artifacts through a compiled pipeline, into nested ones and out of them."""

    def __init__(self, components: dict[str, Any]) -> None:
        self.components = components

    def tasks(self, dag: dict[str, Any], given: Sources) -> Iterator[tuple[str, Sources]]:
        """(step, where each input artifact comes from) of every task that runs a step."""
        for task in dag["tasks"].values():
            sources = {
                name: self._sources(dag, reference, given)
                for name, reference in task.get("inputs", {}).get("artifacts", {}).items()
            }
            component = self.components[task["componentRef"]["name"]]
            if "dag" in component:
                yield from self.tasks(component["dag"], sources)
            else:
                yield _step_of(task), sources

    def _sources(self, dag: dict[str, Any], reference: dict[str, Any], given: Sources) -> set[str]:
        if "componentInputArtifact" in reference:
            return given[reference["componentInputArtifact"]]
        output = reference["taskOutputArtifact"]
        return self._produced(dag["tasks"][output["producerTask"]], output["outputArtifactKey"])

    def _produced(self, task: dict[str, Any], output: str) -> set[str]:
        component = self.components[task["componentRef"]["name"]]
        if "dag" not in component:
            return {f"{_step_of(task)}.{output}"}
        inner = component["dag"]
        selected = inner["outputs"]["artifacts"][output]["artifactSelectors"]
        return set().union(
            *(self._produced(inner["tasks"][s["producerSubtask"]], s["outputArtifactKey"]) for s in selected)
        )


def _step_of(task: dict[str, Any]) -> str:
    """The step of a task: a component that differs from another of its name has a number behind it, or several."""
    return re.sub(r"(-\d+)+$", "", task["componentRef"]["name"].removeprefix("comp-"))


def _in_order() -> list[str]:
    """The steps, each after those whose outputs it reads."""
    read = edges(rounds=1)
    # In a fixed order, also among steps that wait for the same ones.
    order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter(dict.fromkeys(step_names(), ()))
    for name in step_names():
        outputs = set().union(*read.get(name, {}).values())
        order.add(name, *sorted({output.partition(".")[0] for output in outputs}))
    return list(order.static_order())


GENERATED: dict[str, Callable[..., str]] = {
    "settings": settings,
    "cluster-values": cluster_values,
    "chart-values": chart_values,
    "methods": methods,
    "packages": packages,
    "steps": steps,
    "step": step,
    "images": step_images,
    "step-credentials": step_credentials,
    "sizes": sizes,
}
"""What a marker may name."""


def main() -> None:
    """Write what is stale, and say what that was."""
    for path in documents():
        text = current(path)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    path, text = CHART / "values.schema.json", chart_schema()
    if path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
