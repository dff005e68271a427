"""The command run: the complete DAG on this machine, and which method won."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from spectraqlora.artifacts import PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import check_output
from spectraqlora.places import Place, base_place, data_places, file_place
from spectraqlora.runtime.cache import plainly_named
from spectraqlora.settings import Settings

from spectraqlora_pipelines.cli.options import Config, Methods, Preset, Set, given_data, load_settings
from spectraqlora_pipelines.cli.screen import Screen, bars, console, line

if TYPE_CHECKING:
    from types import TracebackType

    from spectraqlora_pipelines.local.containers import HostAccess
    from spectraqlora_pipelines.local.preflight import WorkdirLock


def run(
    base_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Hub id, folder or s3:// address."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="Hub id, file, folder, s3://; may be repeated."),
    ] = None,
    methods: Methods = None,
    rounds: Annotated[int | None, typer.Option(metavar="N", help="Rounds of train and re-evaluate.")] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps per round.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of everything random.")] = None,
    snr_table: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="SNR table to take instead of measuring."),
    ] = None,
    preset: Preset = "default",
    config: Config = None,
    set_: Set = None,
    workdir: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the run.")] = Path("runs/sample"),
    pipeline: Annotated[str, typer.Option(metavar="NAME", help="ablation or retraining.")] = "ablation",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: reuse nothing of earlier runs.")
    ] = False,
    runner: Annotated[str, typer.Option(metavar="NAME", help="subprocess or docker.")] = "subprocess",
    network: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Docker's; host on Linux, else bridge."),
    ] = None,
) -> None:
    """Run the complete DAG on this machine and show which method won.

    Without options it runs the offline sample; run again, it reuses what it can.
    The task's gradients choose what trains; with --preset seed the SNR table.
    Retraining (--pipeline retraining) trains where data or settings changed.

    Example: spectraqlora run --base-model Qwen/Qwen3-0.6B --data my.jsonl
    """
    given = {
        "model.base_model": base_model,
        **given_data(data),
        "methods": methods,
        "snr.table": snr_table,
        "rounds": rounds,
        "train.max_steps": max_steps,
        "seed": seed,
    }
    settings = _with_absolute_files(load_settings(config, given, set_, preset))
    from spectraqlora_pipelines.dags import catalogue
    from spectraqlora_pipelines.dags.placement import Placement
    from spectraqlora_pipelines.local.results import collect, collect_retraining
    from spectraqlora_pipelines.local.run import run_locally

    _check_runner(runner, network)
    kind = catalogue.checked(pipeline)
    network = _checked_network(network) if runner == "docker" else None
    workdir = workdir.expanduser().absolute()
    check_output(workdir, "--workdir", folder=True)
    base, sources = _local_inputs(settings)
    # Held until this process ends: one run works in a workdir.
    contents, lock = _check(settings, base, sources, workdir, kind, fresh)
    data_section = settings.data.at([place.text for place in sources])
    here = settings.model_copy(update={"data": data_section})
    arguments = catalogue.arguments(kind, here, base.text, data_section.named, contents)
    arguments |= _kept_in(workdir, arguments)
    access = _host_access(settings, workdir, [base, *sources], network) if network else None
    with _RunBars(catalogue.steps(kind, settings)) as shown:
        outputs = run_locally(
            catalogue.dag(kind, settings, Placement(retries=0)),
            arguments,
            catalogue.run_key(workdir, settings, contents),
            workdir,
            access,
            shown.on_task,
            shown.on_progress,
            shown.on_rows,
        )
    summary = collect(outputs) if kind == "ablation" else collect_retraining(outputs)
    lock.close()
    if kind != "ablation":
        reason = summary["changes"]["reason"]
        if not summary["changes"]["changed"]:
            line(f"Nothing to train: {reason}.")
            return
        line(f"Trained, for {reason}.")
    _show(summary)
    line(f"Report: {workdir / 'report.html'}")
    line(f"Merged model: {workdir / 'merged'}   Adapter: {workdir / 'adapter'}")
    for name, address in summary["published"].items():
        line(f"Published {name}: {address}")
    line(f"Runs: mlflow ui --backend-store-uri {arguments['tracking']['uri']}")


def _with_absolute_files(settings: Settings) -> Settings:
    """The settings with files called as they are from any folder."""
    table, text = settings.snr.table, settings.promote.guard_data
    if table:
        table = file_place(table, "snr.table").text
    if text:
        text = file_place(text, "promote.guard_data").text
    return settings.model_copy(
        update={
            "snr": settings.snr.model_copy(update={"table": table}),
            "promote": settings.promote.model_copy(update={"guard_data": text}),
        }
    )


def _check_runner(runner: str, network: str | None) -> None:
    if runner not in ("subprocess", "docker"):
        raise InputError("--runner", runner, "subprocess or docker")
    if network and runner != "docker":
        raise InputError("--network", network, "the docker runner; processes use this machine's network")


def _checked_network(network: str | None) -> str:
    """The Docker network of the steps, after a look at the engine and its images."""
    from spectraqlora_pipelines.local.containers import DEFAULT_NETWORK, check_images

    check_images(network := network or DEFAULT_NETWORK)
    return network


def _host_access(settings: Settings, workdir: Path, inputs: list[Place], network: str) -> HostAccess:
    from spectraqlora_pipelines.local.containers import host_access

    return host_access(settings, workdir, inputs, network)


def _local_inputs(settings: Settings) -> tuple[Place, list[Place]]:
    """Base model and data as the steps find them: the sample made, paths absolute."""
    model = settings.model
    base = base_place(model.base_model, model.revision, model.trust_remote_code)
    sources = data_places(settings.data)
    if "sample" in (base.kind, *(place.kind for place in sources)):
        from spectraqlora.sample.make import on_this_machine

        with console.status("preparing the offline sample (pretrained once, one to two minutes)"):
            base, sources = on_this_machine(base), [on_this_machine(place) for place in sources]
    return base, sources


def _check(
    settings: Settings, base: Place, sources: list[Place], workdir: Path, kind: str, fresh: bool
) -> tuple[dict[str, str], WorkdirLock]:
    """Refuse what can be refused before the first step, and make the workdir this run's own.

    Returns:
        Digests of the inputs, so that what changed is not taken from an earlier run, and what keeps others out.
    """
    from spectraqlora_pipelines.local import preflight

    with console.status("checking model, data and settings"):
        pins = preflight.commits(settings, base, sources, workdir, fresh)
        remarks = preflight.check(settings, base, sources, pins.get("base_model", ""))
        contents = preflight.contents(settings, base, sources, workdir, pins)
        memory = preflight.memory_warning(settings, base)
        preflight.check_disk(settings, base, sources, workdir, fresh)
    for warning in [*([memory] if memory else []), *remarks]:
        line(warning, style="yellow")
    # Retraining is run again because its data changed: a hub id's newest commit is taken each time.
    pinned = {key: value for key, value in contents.items() if kind == "ablation" or key != "data"}
    return contents, preflight.claim_workdir(workdir, settings, pinned, kind, fresh)


def _kept_in(workdir: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that keep runs and checkpoints in the workdir, where settings name no other place."""
    tracking, checkpoint = arguments["tracking"], arguments["checkpoint"]
    # Checkpoints are below the root that every runner's steps see.
    return {
        "tracking": {**tracking, "uri": tracking["uri"] or f"sqlite:///{plainly_named(workdir)}/mlflow.db"},
        "checkpoint": {
            **checkpoint,
            "folder": os.path.expanduser(checkpoint["folder"]) or str(workdir / "artifacts" / "checkpoints"),
        },
    }


class _RunBars:
    """Two bars, steps of the run and what the present step counts; a line for every step where no terminal is.

    Args:
        steps: how many the run has at most.
    """

    def __init__(self, steps: int) -> None:
        # Bound to the stream itself: while steps run, sys.stdout leads to the log file.
        self._screen = Screen(file=sys.stdout)
        self._bars = bars(self._screen)
        self._steps, self._started = steps, 0
        self._reused: list[str] = []
        self._run = self._bars.add_task("starting", total=steps)
        self._step: Any = None

    def __enter__(self) -> _RunBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._reused and self._screen.is_terminal:
            self._say(f"Reused {len(self._reused)} of {self._started} steps: {', '.join(self._reused)}.")

    def on_task(self, name: str, why: str | None) -> None:
        """A step starts, or (None) is taken from an earlier run.

        Args:
            name: of the step.
            why: it is not taken from an earlier run; empty where nothing is to be said of that.
        """
        self._started += 1
        if why is None:
            self._reused.append(name)
        if self._step is not None:
            self._bars.remove_task(self._step)
            self._step = None
        self._bars.update(self._run, completed=self._started - 1, description=name)
        note = " (reused)" if why is None else ""
        if not self._screen.is_terminal:
            self._say(f"[{self._started}/{self._steps}] {name}{note}")
        if why:
            self._say(f"{name} is the first step that runs again: {why}")

    def _say(self, text: str) -> None:
        self._screen.print(text, soft_wrap=True, highlight=False)

    def on_progress(self, done: int, total: int, label: str) -> None:
        """The present step has done so much of what it counts."""
        if self._step is None:
            self._step = self._bars.add_task(label, total=total)
        self._bars.update(self._step, completed=done, total=total, description=label)

    def on_rows(self, folder: Path) -> None:
        """The rows are prepared: what became of the data."""
        from spectraqlora_pipelines.cli.data_block import show_rows

        show_rows(PreparedRows.read(folder), self._screen)


def _show(summary: dict[str, Any]) -> None:
    console.print(_leaderboard(summary))
    tied = [name for name, test in summary["against_best"].items() if test["tied"]]
    why = f", of {len(tied)} that are tied ({', '.join(tied)})" if len(tied) > 1 else ""
    line(f"* Winner: {summary['winner']}{why}")
    registered = summary["registered"]
    line(
        f"Merged into the {summary['merged_into']} weights: eval loss {summary['merged_eval_loss']:.4f}. "
        f"Registered as {registered['name']} version {registered['version']}."
    )
    test = summary["test"]
    if test["loss"] is not None:
        line(
            f"Test loss, on {test['rows']:,} rows that chose nothing: {test['loss']:.4f} ± {test['loss_stderr']:.4f}; "
            f"the base's {test['base_loss']:.4f}."
        )
    if summary["merge_warning"]:
        line(f"Warning: {summary['merge_warning']}", style="yellow")
    gate = summary["promotion"]
    champion = "none" if gate["now"] is None else f"version {gate['now']}"
    line(
        f"{'Gate' if gate['enabled'] else 'Gate (off, so it changed nothing)'}: {gate['decision']}: "
        f"{gate['reason']}. Champion: {champion}."
    )


def _leaderboard(summary: dict[str, Any]) -> Table:
    table = Table(title="Leaderboard: eval loss, perplexity, exact answers, trained parameters, cost")
    for column in ("method", "loss", "ppl", "exact", "trained", "sec", "tok/s", "MiB"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    base = summary["base"]
    table.add_row(
        "base (4-bit)",
        f"{base['eval_loss']:.4f}",
        f"{base['perplexity']:.4g}",
        percent(base["accuracy"]),
        *[""] * 4,
    )
    for name, entry in summary["methods"].items():
        table.add_row(
            Text(f"{name} *", "bold green") if name == summary["winner"] else Text(name),
            f"{entry['eval_loss']:.4f}",
            f"{entry['perplexity']:.2f}",
            percent(entry["accuracy"]),
            f"{entry['trainable_parameters']:,}",
            f"{entry['train_seconds']:.1f}",
            f"{entry['train_tokens_per_second']:.0f}",
            f"{entry['peak_memory_bytes'] / 2**20:.0f}",
        )
    return table
