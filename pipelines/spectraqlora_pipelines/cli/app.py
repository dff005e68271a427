"""The command line: its commands in their panels, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer
from spectraqlora import __version__
from spectraqlora.errors import InputError
from spectraqlora.runtime.disk import full
from spectraqlora.runtime.logs import silence_libraries
from typer.core import TyperGroup

from spectraqlora_pipelines.cli.compile import compile_
from spectraqlora_pipelines.cli.data import data
from spectraqlora_pipelines.cli.gc import gc
from spectraqlora_pipelines.cli.kubeflow import variables
from spectraqlora_pipelines.cli.logs import logs
from spectraqlora_pipelines.cli.models import models
from spectraqlora_pipelines.cli.plan import plan
from spectraqlora_pipelines.cli.promote import promote
from spectraqlora_pipelines.cli.registry import SIGN_IN
from spectraqlora_pipelines.cli.report import report
from spectraqlora_pipelines.cli.run import run
from spectraqlora_pipelines.cli.sample import sample
from spectraqlora_pipelines.cli.schedule import schedule
from spectraqlora_pipelines.cli.screen import errors, line
from spectraqlora_pipelines.cli.settings import most_changed, settings
from spectraqlora_pipelines.cli.snr import snr
from spectraqlora_pipelines.cli.status import status
from spectraqlora_pipelines.cli.submit import submit
from spectraqlora_pipelines.cli.verify import verify

_USAGE: Any = typer.BadParameter.__bases__[0]
"""Typer's error about arguments, of which that about a value is one."""
STEP_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes; promote has one more."""


class _Root(TyperGroup):
    """The commands, without the panel of the two options that the usage names."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.hidden = True
        return option

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[--version]", "COMMAND [--help]"]


app = typer.Typer(
    cls=_Root,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
RUN_AND_LOOK, CLUSTER = "Run and look", "Cluster and models"

app.command(rich_help_panel=RUN_AND_LOOK, epilog=most_changed())(run)
for command in (report, data, snr, plan, sample, settings):
    app.command(rich_help_panel=RUN_AND_LOOK)(command)
app.command("compile", rich_help_panel=CLUSTER)(compile_)
app.command(rich_help_panel=CLUSTER, epilog=variables(submit))(submit)
app.command(rich_help_panel=CLUSTER, epilog=variables(status))(status)
app.command(rich_help_panel=CLUSTER, epilog=variables(logs))(logs)
app.add_typer(schedule, name="schedule", rich_help_panel=CLUSTER)
app.command(rich_help_panel=CLUSTER, epilog=SIGN_IN)(models)
app.command(rich_help_panel=CLUSTER, epilog=SIGN_IN)(gc)
app.command(rich_help_panel=CLUSTER, epilog=SIGN_IN)(verify)
app.add_typer(promote, name="promote", rich_help_panel=CLUSTER)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", hidden=True, help="Show the version.")] = False,
) -> None:
    if version:
        line(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. Exit code 0: all went well; 1: a step failed; 2: bad input; 3: not promoted; 75: a service did not answer;
    130: Ctrl-C."""
    from spectraqlora_pipelines.local.run import StepFailed

    silence_libraries()
    try:
        code = app(standalone_mode=False)
        if isinstance(code, int) and code:
            sys.exit(code)
    except _USAGE as error:
        if not error.format_message():  # No command: the help is what it says.
            error.show()
            sys.exit(BAD_INPUT)
        _end(str(_usage(error)), BAD_INPUT)
    except InputError as error:
        _end(f"{error.prefix}{error}", error.exit_code)
    except StepFailed as error:
        _end(str(error), STEP_FAILED)
    except SystemExit as ended:
        # Typer ends on Ctrl-C with this code and without a word.
        if ended.code == INTERRUPTED:
            errors.print("interrupted; run, and snr with --output, resume where they stopped")
        raise
    except Exception as error:
        no_room = full(error)
        if no_room is None and isinstance(error, OSError) and error.filename is not None:
            expected = f"one that can be read and written as it is meant ({error.strerror})"
            _end(str(InputError("file or folder", error.filename, expected)), BAD_INPUT)
        if no_room is None:
            raise
        _end(str(no_room), BAD_INPUT)


def _usage(error: Any) -> InputError:
    """What typer says of the arguments, as every other bad input is said: the option, the command line, what is expected."""
    parameter = getattr(error, "param", None)
    field = (
        parameter.opts[0] if parameter is not None and parameter.opts else getattr(error, "option_name", None)
    )
    path = error.ctx.command_path if error.ctx is not None else "spectraqlora"
    message = " ".join(error.format_message().split()).rstrip(".")
    given = " ".join(sys.argv[1:])
    return InputError(field or "command line", given, f"what {path} --help says: {message}")


def _end(error: str, code: int) -> NoReturn:
    errors.print(f"error: {error}", highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
