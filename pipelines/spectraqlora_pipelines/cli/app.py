"""The command line: run, compile, snr, sample, report, settings, and the commands of other modules."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from spectraqlora import __version__
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import names
from spectraqlora.runtime.logs import silence_libraries
from spectraqlora.settings import Settings, is_address, parse, reference

from spectraqlora_pipelines.cli import kubeflow_commands, plan_commands, promotion_commands
from spectraqlora_pipelines.cli.config import load_settings
from spectraqlora_pipelines.cluster.values import reference as values_reference

if TYPE_CHECKING:
    import pandas as pd
    from spectraqlora.models.tensors import Tensors

COMPILED = Path(__file__).resolve().parents[2]
BAD_INPUT, INTERRUPTED = 2, 130
_LAYERS = re.compile(r"(?=\b\d+\.)")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune with QLoRA where Spectrum finds signal: one DAG, one branch per method, one winner.",
)
# Bound to the stream itself: while steps run, sys.stdout leads to the log file.
console = Console(file=sys.stdout)
errors = Console(stderr=True, soft_wrap=True)

_SETTINGS_HELP = "\n\n".join(
    ["[bold]Settings for --set and --config[/bold]"]
    + [
        f"[cyan]{key}[/cyan] = {default.replace('[', chr(92) + '[')}  {text}"
        for key, default, text in reference()
    ]
)

_VALUES_HELP = "\n\n".join(
    ["[bold]Keys of --values; steps.NAME takes the keys of defaults[/bold]"]
    + [
        f"[cyan]{key.replace('[', chr(92) + '[')}[/cyan] = {default.replace('[', chr(92) + '[')}  {text}"
        for key, default, text in values_reference()
    ]
)


@app.command(epilog=_SETTINGS_HELP)
def run(
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder of safetensors or s3:// address. Default: the offline sample."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Hub id, .jsonl, .json, .csv, .parquet, folder or s3:// address. Default: the offline sample."
        ),
    ] = None,
    methods: Annotated[str | None, typer.Option(help=f"Branches: {', '.join(names())}.")] = None,
    snr_table: Annotated[
        str | None,
        typer.Option(
            help="SNR table to take instead of measuring: Spectrum's JSON, or Parquet; a path or s3:// address."
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of train and re-evaluate.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps per round.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    workdir: Annotated[Path, typer.Option(help="Where everything of this run is kept.")] = Path(
        "runs/sample"
    ),
    runner: Annotated[str, typer.Option(help="subprocess, or docker with the step images.")] = "subprocess",
    pipeline: Annotated[
        str,
        typer.Option(help="ablation, or retraining: train again where data changed, promote by the gate."),
    ] = "ablation",
    network: Annotated[
        str | None,
        typer.Option(
            help="Docker network of the steps. Default on Linux: host, so that S3 and MLflow on this machine "
            "are reached at their usual addresses; elsewhere bridge, where they are at host.docker.internal."
        ),
    ] = None,
) -> None:
    """Run the whole DAG on this machine and show which method won.

    Without arguments it runs the offline sample. The same command again reuses every finished step.

    Example: spectraqlora run --base-model Qwen/Qwen3-0.6B --data my.jsonl --workdir runs/mine

    Retraining, again whenever my.jsonl may have grown:
    spectraqlora run --pipeline retraining --base-model Qwen/Qwen3-0.6B --data my.jsonl --workdir runs/live
    """
    settings = load_settings(
        config,
        {
            "model.base_model": base_model,
            "data.source": data,
            "methods": methods,
            "snr.table": snr_table
            if not snr_table or is_address(snr_table)
            else str(Path(snr_table).resolve()),
            "rounds": rounds,
            "train.max_steps": max_steps,
            "seed": seed,
        },
        set_ or [],
    )
    if runner not in ("subprocess", "docker"):
        raise InputError("--runner", runner, "subprocess or docker")
    if network and runner != "docker":
        raise InputError("--network", network, "the docker runner; processes use this machine's network")
    from spectraqlora_pipelines.dags import catalogue
    from spectraqlora_pipelines.dags.placement import Placement
    from spectraqlora_pipelines.local import preflight
    from spectraqlora_pipelines.local.results import collect, collect_retraining
    from spectraqlora_pipelines.local.run import run_locally

    kind = catalogue.checked(pipeline)
    if runner == "docker":
        from spectraqlora_pipelines.local.containers import DEFAULT_NETWORK, check_images, surroundings

        check_images(network := network or DEFAULT_NETWORK)

    base, source = _resolve_sample(settings)
    base, source = (str(Path(p).resolve()) if Path(p).exists() else p for p in (base, source))
    with console.status("checking model, data and settings"):
        preflight.check(settings, base, source)
        contents = {"base_model": preflight.content_digest(base), "data": preflight.content_digest(source)}
        if settings.snr.table:
            contents["snr_table"] = preflight.content_digest(settings.snr.table)
        memory = preflight.memory_warning(settings, base)
    if memory:
        console.print(memory, style="yellow", soft_wrap=True, highlight=False, markup=False)
    workdir = workdir.absolute()
    # Retraining is run again because its data changed.
    fixed = {key: value for key, value in contents.items() if kind == "ablation" or key != "data"}
    preflight.claim_workdir(workdir, settings, fixed, kind)
    arguments = catalogue.arguments(kind, settings, base, source, contents)
    arguments["run_key"] = catalogue.run_key(workdir, settings, contents)
    if not settings.tracking.uri:
        arguments["tracking"]["uri"] = f"sqlite:///{workdir}/mlflow.db"
    if not settings.checkpoint.folder:
        # Below the root that every runner's steps see.
        arguments["checkpoint"]["folder"] = str(workdir / "artifacts" / "checkpoints")
    containers = None
    if network:
        containers = surroundings(settings, workdir, [base, source], network)
    steps = catalogue.steps(kind, settings)
    with _bars() as bars:
        whole = bars.add_task("starting", total=steps)
        inner: Any = None
        done = -1

        def on_task(name: str) -> None:
            nonlocal done, inner
            done += 1
            if inner is not None:
                bars.remove_task(inner)
                inner = None
            bars.update(whole, completed=done, description=name)
            if not console.is_terminal:
                console.print(f"[{done + 1}/{steps}] {name}", highlight=False, markup=False)

        def on_progress(now: int, total: int, label: str) -> None:
            nonlocal inner
            if inner is None:
                inner = bars.add_task(label, total=total)
            bars.update(inner, completed=now, total=total, description=label)

        run_locally(
            catalogue.dag(kind, settings, Placement(retries=0)),
            arguments,
            workdir,
            containers,
            on_task,
            on_progress,
        )
        bars.update(whole, completed=steps, description="done")
    if kind == "ablation":
        summary = collect(settings, workdir)
    else:
        summary = collect_retraining(settings, workdir)
        reason = summary["changes"]["reason"]
        if not summary["changes"]["changed"]:
            console.print(f"Nothing to train: {reason}.", soft_wrap=True)
            return
        console.print(f"Trained, for {reason}.", soft_wrap=True)
    _show(summary)
    console.print(f"Report: {workdir / 'report.html'}", soft_wrap=True)
    console.print(f"Merged model: {workdir / 'merged'}   Adapter: {workdir / 'adapter'}", soft_wrap=True)
    for name, address in summary["published"].items():
        console.print(f"Published {name}: {address}", soft_wrap=True)
    console.print(f"Runs: mlflow ui --backend-store-uri {arguments['tracking']['uri']}", soft_wrap=True)


@app.command("compile", epilog=_VALUES_HELP)
def compile_(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the KFP IR YAML. Default: pipelines/PIPELINE.yaml; for a cluster PIPELINE.yaml."
        ),
    ] = None,
    pipeline: Annotated[str, typer.Option(help="ablation or retraining.")] = "ablation",
    methods: Annotated[str | None, typer.Option(help="Branches of the ablation DAG.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, unrolled.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    target: Annotated[str, typer.Option(help="local, or kubernetes with a values file.")] = "local",
    values: Annotated[
        Path | None, typer.Option(help="YAML file that says where and how each step runs on the cluster.")
    ] = None,
) -> None:
    """Write the pipeline YAML for Kubeflow Pipelines.

    For a cluster the values file gives every step its image, resources, nodes, retries, secrets by name and
    time limit; pipelines/cluster-values.yaml is an example to copy.

    Example: spectraqlora compile --target kubernetes --values cluster-values.yaml --output pipeline.yaml
    """
    from spectraqlora_pipelines.cluster.values import read_values
    from spectraqlora_pipelines.dags.catalogue import checked, compile_dag

    kind = checked(pipeline)
    if target not in ("local", "kubernetes"):
        raise InputError("--target", target, "local or kubernetes")
    if (target == "kubernetes") != (values is not None):
        expected = "a values file" if values is None else "nothing without --target kubernetes"
        raise InputError("--values", values, expected)
    settings = load_settings(config, {"methods": methods, "rounds": rounds}, set_ or [])
    output = output or (Path() if values else COMPILED) / f"{kind}.yaml"
    placed = read_values(values) if values else None
    try:
        compile_dag(output, kind, settings, placed)
    except ValueError as error:
        raise InputError("--output", output, str(error).splitlines()[0]) from None
    console.print(f"Wrote {output}", soft_wrap=True)


@app.command()
def snr(
    model: Annotated[
        str, typer.Argument(help="Folder of safetensors (4-bit ones too), hub id, or s3:// address.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the table as Parquet. An interrupted scan goes on from OUTPUT.partial.jsonl."
        ),
    ] = None,
    spectrum_json: Annotated[Path | None, typer.Option(help="Write Spectrum's own JSON.")] = None,
    percent: Annotated[float, typer.Option(help="Share of each module type to select.")] = 50.0,
    unfrozen_yaml: Annotated[
        Path | None, typer.Option(help="Write the unfrozen-parameters file that Axolotl and Spectrum read.")
    ] = None,
) -> None:
    """Show the signal-to-noise ratio of every weight matrix of a checkpoint.

    A checkpoint at an s3:// address is read where it is, a matrix at a time, without a copy on disk.

    Example: spectraqlora snr s3://models/llama --percent 25 --unfrozen-yaml unfrozen.yaml
    """
    if not 0 < percent <= 100:
        raise InputError("--percent", percent, "a number above 0 and at most 100")
    from spectraqlora.snr.journal import ScanJournal
    from spectraqlora.snr.scan import scan
    from spectraqlora.snr.spectrum_format import spectrum_json as to_json
    from spectraqlora.snr.spectrum_format import unfrozen_yaml as to_yaml
    from spectraqlora.snr.table import top_modules

    checkpoint = _open_checkpoint(model)
    finished = None
    if output:
        finished = ScanJournal(output.with_name(output.name + ".partial.jsonl"), checkpoint.digest)
    # Matrices of a large model take minutes each: the estimate of the time left looks back far enough.
    with _bars(bar_width=20, speed_estimate_period=1800) as bars:
        bar: Any = None

        def on_matrix(done: int, total: int, module: str) -> None:
            nonlocal bar
            if bar is None:
                bar = bars.add_task("measuring", total=total, completed=done)
            else:
                bars.update(bar, completed=done, description=module[_common_prefix([module]) :])

        table = scan(checkpoint, None, on_matrix, finished)
    chosen = top_modules(table, percent)
    console.print(_snr_table(table, chosen, percent, console))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(output)
    if finished:
        finished.remove()
    from spectraqlora.files import write_text

    if spectrum_json:
        write_text(spectrum_json, to_json(table))
    if unfrozen_yaml:
        write_text(unfrozen_yaml, to_yaml(table, percent))


@app.command()
def sample(folder: Annotated[Path, typer.Argument(help="Where to write model/ and data.jsonl.")]) -> None:
    """Write the offline sample: a small pretrained Llama and a task it does not know yet."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("DIR", folder, "a new or empty folder")
    import shutil

    from spectraqlora.sample.make import ensure_sample

    with console.status("pretraining the sample model, one to two minutes the first time"):
        cached = ensure_sample()
    shutil.copytree(cached, folder, dirs_exist_ok=True)
    console.print(f"Wrote {folder / 'model'} and {folder / 'data.jsonl'}", soft_wrap=True)


@app.command()
def report(workdir: Annotated[Path, typer.Argument(help="The workdir of a finished run.")]) -> None:
    """Write a finished run's report.html again."""
    from spectraqlora_pipelines.local.results import report as write

    try:
        stored = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError("WORKDIR", workdir, "the workdir of a finished run") from None
    console.print(f"Report: {write(parse(stored['settings']), workdir.absolute())}", soft_wrap=True)


@app.command("settings")
def settings_(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table in the README.")] = False,
) -> None:
    """List every setting with its default."""
    if markdown:
        print("| setting | default | meaning |\n| --- | --- | --- |")
        for key, default, meaning in reference():
            print(f"| `{key}` | `{default}` | {meaning} |")
        return
    shown = Table("setting", "default", "meaning")
    for row in reference():
        shown.add_row(*(part.replace("[", "\\[") for part in row))
    console.print(shown)


def _resolve_sample(settings: Settings) -> tuple[str, str]:
    base, source = settings.model.base_model, settings.data.source
    if "sample" not in (base, source):
        return base, source
    from spectraqlora.sample.make import ensure_sample

    with console.status("preparing the offline sample (pretrained once, one to two minutes)"):
        folder = ensure_sample()
    return (
        str(folder / "model") if base == "sample" else base,
        str(folder / "data.jsonl") if source == "sample" else source,
    )


def _open_checkpoint(model: str) -> Tensors:
    from spectraqlora.models.tensors import LocalTensors, check_model_folder
    from spectraqlora.places import resolve_base

    if is_address(model):
        from spectraqlora.models.remote_tensors import S3Tensors
        from spectraqlora.storage import parse_address

        return S3Tensors(parse_address(model, "MODEL"))
    if not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/"))):
        raise InputError(
            "MODEL", model, "an existing folder, a hub id such as owner/name, or an s3:// address"
        )
    folder = resolve_base(model, "main")
    check_model_folder(folder)
    return LocalTensors(folder)


def _bars(bar_width: int = 40, speed_estimate_period: float = 30.0) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=speed_estimate_period,
    )


def _snr_table(table: pd.DataFrame, chosen: set[str], percent: float, screen: Console) -> Table:
    """The table as wide as the screen allows: first the modules' common prefix goes, then columns."""
    prefix = _common_prefix(list(table["module"]))
    title = f"SNR of {len(table)} matrices; * is in the top {percent:g} % of its type"
    columns: dict[str, Callable[[Any], str]] = {
        "": lambda row: "*" if row.module in chosen else "",
        "module": lambda row: row.module,
        "shape": lambda row: f"{row.rows}x{row.cols}",
        "s1": lambda row: f"{row.s1:.3f}",
        "threshold": lambda row: f"{row.threshold:.3f}",
        "snr": lambda row: f"{row.snr:.4f}",
        "calibrated": lambda row: f"{row.calibrated:.3f}",
        "percentile": lambda row: f"{row.percentile:.0f}",
    }

    def layout() -> Table:
        shown = Table(title=title)
        for name in columns:
            shown.add_column(name, justify="left" if name in ("", "module") else "right", overflow="fold")
        for row in table.itertuples():
            shown.add_row(*(cell(row) for cell in columns.values()))
        return shown

    def fits(shown: Table) -> bool:
        return Measurement.get(screen, screen.options.update_width(1000), shown).maximum <= screen.width

    if fits(shown := layout()):
        return shown
    columns["module"] = lambda row: row.module[prefix:]
    title += f"\nmodules inside {table['module'].iloc[0][:prefix].rstrip('.')}" if prefix else ""
    for dropped in ("threshold", "s1", "percentile", "shape"):
        if fits(shown := layout()):
            break
        del columns[dropped]
    return layout()


def _common_prefix(modules: list[str]) -> int:
    """Characters before the layer index, where all modules share them, else 0."""
    heads = {_LAYERS.split(module, maxsplit=1)[0] for module in modules}
    return len(heads.pop()) if len(heads) == 1 else 0


def _show(summary: dict[str, Any]) -> None:
    base = summary["base"]
    table = Table(title="Leaderboard: eval loss and perplexity, exact answers, trained parameters, cost")
    for column in (
        "method",
        "loss",
        "ppl",
        "exact",
        "trained",
        "sec",
        "tok/s",
        "MiB",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    table.add_row(
        "base (4-bit)",
        f"{base['eval_loss']:.4f}",
        f"{base['perplexity']:.4g}",
        percent(base["accuracy"]),
        *[""] * 4,
    )
    for name, entry in summary["methods"].items():
        table.add_row(
            f"[bold green]{name} *[/]" if name == summary["winner"] else name,
            f"{entry['eval_loss']:.4f}",
            f"{entry['perplexity']:.2f}",
            percent(entry["accuracy"]),
            f"{entry['trainable_parameters']:,}",
            f"{entry['train_seconds']:.1f}",
            f"{entry['train_tokens_per_second']:.0f}",
            f"{entry['peak_memory_bytes'] / 2**20:.0f}",
        )
    console.print(table)
    console.print(f"* Winner: {summary['winner']}")
    registered = summary["registered"]
    console.print(
        f"Merged into the {summary['merged_into']} weights: eval loss {summary['merged_eval_loss']:.4f}. "
        f"Registered as {registered['name']} version {registered['version']}.",
        soft_wrap=True,
    )
    gate = summary["promotion"]
    champion = "none" if gate["now"] is None else f"version {gate['now']}"
    console.print(
        f"{'Gate' if gate['enabled'] else 'Gate (off, so it changed nothing)'}: {gate['decision']}: "
        f"{gate['reason']}. Champion: {champion}.",
        soft_wrap=True,
    )


def main() -> None:
    """Entry point: exit code 0 when all went well, 2 for bad input, 1 for a failed step, 130 for Ctrl-C."""
    from spectraqlora_pipelines.local.run import StepFailed

    silence_libraries()
    try:
        app()
    except InputError as error:
        errors.print(f"error: {error}", markup=False, highlight=False)
        sys.exit(BAD_INPUT)
    except StepFailed as error:
        errors.print(f"error: {error}", markup=False, highlight=False)
        sys.exit(1)
    except OSError as error:
        if error.errno != 28:
            raise
        errors.print(f"error: disk: {error.filename!r}: expected free space; it is full", markup=False)
        sys.exit(BAD_INPUT)
    except SystemExit as ended:
        # Typer ends on Ctrl-C with this code and without a word.
        if ended.code == INTERRUPTED:
            errors.print("interrupted; run, and snr with --output, go on where they stopped")
        raise


app.command("plan", epilog=_SETTINGS_HELP)(plan_commands.plan)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit


app.command()(kubeflow_commands.submit)
app.add_typer(kubeflow_commands.schedule, name="schedule")
app.command()(promotion_commands.models)
app.add_typer(promotion_commands.promote, name="promote")

if __name__ == "__main__":
    main()
