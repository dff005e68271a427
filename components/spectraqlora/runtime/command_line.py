"""A step run with plain arguments: the command line of the step images, and of Argo Workflows without KFP.

Options come from the step's KFP component: its signature says names and types, its docstring what they mean.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from spectraqlora.errors import InputError
from spectraqlora.files import apply_umask, write_text
from spectraqlora.runtime.component import plain
from spectraqlora.runtime.images import IMAGE, component_of, images, step_names
from spectraqlora.settings import Settings

_DEFAULTS: dict[str, Any] = {
    "content": "",
    "round": 1,
    "rounds": 1,
    "seed": Settings().seed,
}
"""What a parameter without default is worth where a step runs alone."""
_REQUIRED = inspect.Parameter.empty
RETURNED = "Output"
"""The text that is what the step returns, by KFP's name for it."""


class Option(NamedTuple):
    """One option of a step: a parameter (kind str, int, float, bool or dict), a folder (input, output) or a text.

    A text is a file for one value that the step returns, such as a digest; by hand it may be left out.
    """

    name: str
    kind: str
    default: Any
    help: str
    artifact: type | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is one file: a text, and an HTML artifact, which KFP shows only as such."""
        return self.kind == "text" or getattr(self.artifact, "schema_title", "") == "system.HTML"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-").lower()

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED


def steps() -> list[str]:
    """All steps, or those of the image that this runs in."""
    here = os.environ.get(IMAGE)
    return images()[here] if here else step_names()


def component(step: str) -> Callable[..., Any]:
    """The component's function without KFP's decorator."""
    return plain(component_of(step))


def options(function: Callable[..., Any]) -> list[Option]:
    """The options that a component's signature and docstring describe."""
    from kfp.dsl import PipelineTaskFinalStatus
    from kfp.dsl.types import type_annotations as kfp_types

    meanings = _meanings(function)
    described = []
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = kfp_types.maybe_strip_optional_from_annotation(parameter.annotation)
        meaning = meanings.get(name, "")
        if kfp_types.is_Input_Output_artifact_annotation(annotation):
            kind = "output" if kfp_types.is_artifact_wrapped_in_Output(annotation) else "input"
            artifact = kfp_types.get_io_artifact_class(annotation)
            described.append(Option(name, kind, parameter.default, meaning, artifact))
        elif isinstance(annotation, kfp_types.OutputPath):
            described.append(Option(name, "text", None, meaning))
        elif annotation is PipelineTaskFinalStatus:
            described.append(Option(name, "str", "FAILED", meaning))
        else:
            default = parameter.default
            if default is _REQUIRED:
                default = {} if annotation is dict else _DEFAULTS.get(name, _REQUIRED)
            described.append(Option(name, annotation.__name__, default, meaning))
    if inspect.signature(function).return_annotation is str:
        described.append(Option(RETURNED, "text", None, "the text that the step returns"))
    return described


def summary(function: Callable[..., Any]) -> str:
    """What a component's docstring says before its arguments."""
    return (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]


def example(step: str) -> str:
    """A command line of the step with what it cannot do without."""
    given = " ".join(
        f"{option.flag} {option.name if option.artifact else option.kind.upper()}"
        for option in options(component(step))
        if option.required
    )
    return f"{step} {given}"


def _meanings(function: Callable[..., Any]) -> dict[str, str]:
    _, _, lines = (inspect.getdoc(function) or "").partition("Args:")
    meanings: dict[str, str] = {}
    name = ""
    for line in lines.splitlines():
        head, colon, rest = line.strip().partition(": ")
        if colon and head.isidentifier():
            name, meanings[head] = head, rest
        elif name and line.strip():
            meanings[name] += " " + line.strip()
    return meanings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError("arguments", self.prog, f"{message}; --help explains them")


def parser(step: str, function: Callable[..., Any]) -> argparse.ArgumentParser:
    """The step's command line."""
    made = _Parser(
        prog=step,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{step}: {summary(function)}",
        epilog=f"""Example: {example(step)}

Folders and files are artifacts: what one step writes, the next one reads.
Sections are JSON objects of settings; what is left out keeps its default.
Exit code 0: done; 2: bad input, in one line; 75: a service did not answer, in one line; 1: an error.""",
    )
    for option in options(function):
        shown = f"{option.help} " if option.help else ""
        if option.kind in ("input", "output", "text"):
            made.add_argument(
                option.flag,
                dest=option.name,
                metavar="FILE" if option.is_file else "DIR",
                required=option.required,
                help=(
                    f"{shown}({'file' if option.is_file else 'folder'} "
                    f"{'read' if option.kind == 'input' else 'written'})"
                ).replace("%", "%%"),
            )
        else:
            note = "" if option.required else f"(default: {json.dumps(option.default)})"
            metavar = {"dict": "JSON", "str": "TEXT", "int": "NUMBER", "float": "NUMBER"}.get(option.kind)
            made.add_argument(
                option.flag,
                dest=option.name,
                metavar=metavar or option.kind.upper(),
                required=option.required,
                default=None if option.required else option.default,
                help=f"{shown}{note}".replace("%", "%%"),
            )
    return made


def _value(option: Option, given: Any) -> Any:
    if not isinstance(given, str) or option.kind == "str":
        return given
    wanted: dict[str, tuple[type, ...]] = {
        "dict": (dict,),
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
    }
    try:
        value = json.loads(given)
    except ValueError:
        value = None
    if not isinstance(value, wanted[option.kind]) or (isinstance(value, bool) and option.kind != "bool"):
        expected = {"dict": "a JSON object such as '{\"max_steps\": 40}'", "bool": "true or false"}
        raise InputError(option.flag, given, expected.get(option.kind, f"a number of type {option.kind}"))
    return value


def _artifact(option: Option, given: str | None) -> Any:
    if given is None:
        return None
    path = Path(given).absolute()
    if option.kind == "input" and not path.is_dir():
        raise InputError(option.flag, given, "the folder of an artifact")
    if option.kind == "output":
        try:
            (path.parent if option.is_file else path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(option.flag, given, f"a folder that can be written ({error.strerror})") from None
    assert option.artifact is not None
    return option.artifact(name=option.name, uri=str(path))


def run(step: str, arguments: Sequence[str]) -> None:
    """Run a step; metadata of what it wrote is printed as one JSON line.

    Raises:
        InputError: an argument is not what the step expects.
    """
    function = component(step)
    given = vars(parser(step, function).parse_args(arguments))
    values: dict[str, Any] = {}
    written: dict[str, Any] = {}
    texts = {option.name: given[option.name] for option in options(function) if option.kind == "text"}
    for option in options(function):
        if option.kind in ("input", "output"):
            values[option.name] = _artifact(option, given[option.name])
        elif option.kind != "text":
            values[option.name] = _value(option, given[option.name])
        if option.kind == "output":
            written[option.name] = values[option.name]
    tracking = values.get("tracking_settings")
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(tracking, dict) and not tracking.get("uri"):
            # Nobody named a server: what MLflow's own variable says, else a store that ends with the step.
            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{scratch}/mlflow.db"
            values["tracking_settings"] = {**tracking, "uri": uri}
        texts = {name: str(path or Path(scratch) / name) for name, path in texts.items()}
        result = texts.pop(RETURNED, None)
        returned = function(**values, **texts)
        if result is not None:
            write_text(Path(result), str(returned))
            texts[RETURNED] = result
        for artifact in written.values():
            # Who takes the folder along may be another user, as Argo's executor is; safetensors writes for its own alone.
            if artifact is not None and Path(artifact.path).is_dir():
                apply_umask(Path(artifact.path))
        values_written = {name: Path(path).read_text(encoding="utf-8") for name, path in texts.items()}
    print(json.dumps({name: artifact.metadata for name, artifact in written.items()} | values_written))


def main(arguments: Sequence[str]) -> None:
    """Run a step, explain it, or pass on to the program that is named, as KFP names its launcher."""
    known = steps()
    expected = f"one of {', '.join(known)}"
    first = arguments[0] if arguments else "--help"
    try:
        if first in known:
            run(first, arguments[1:])
        elif first.startswith("-") and len(known) == 1:
            run(known[0], arguments or ["--help"])
        elif first in ("-h", "--help"):
            print("Steps; each explains itself with STEP --help:\n")
            for step in known:
                head, _, _ = summary(component(step)).partition("\n")
                print(f"  {step:<16}{head}")
        elif first.startswith("-"):
            raise InputError("STEP", first, expected)
        else:
            _become(arguments, f"{expected}, or a program")
    except InputError as error:
        print(f"error: {error.prefix}{error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _become(arguments: Sequence[str], expected: str) -> None:
    try:
        os.execvp(arguments[0], list(arguments))
    except OSError:
        raise InputError("STEP", arguments[0], expected) from None
