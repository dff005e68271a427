"""Training resumes from its newest checkpoint that is complete, as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spectraqlora.artifacts import TrainingLog
from spectraqlora.errors import InputError, Stopped
from spectraqlora.files import file_digest
from spectraqlora.models import adapters
from spectraqlora.settings import CheckpointSettings, TrainSettings
from spectraqlora.steps.train.between_steps import BetweenSteps
from spectraqlora.steps.train.request import Inputs, TrainRequest
from spectraqlora.steps.train.training import train

from tests.s3 import BUCKET, SECRET_KEY, Fault, Proxy, Request, Server, environment
from tests.unit.models.test_adapters import DOWN, Q0, rank_map

STEPS = 8
# Dropout draws from the random state, accumulation ends steps in the middle of the trainer's batches.
SETTINGS = TrainSettings(
    max_steps=STEPS, batch_size=2, gradient_accumulation=2, lora_dropout=0.2, evaluations=4, weight_decay=0.01
)
SCRIPT = """
import sys
from pathlib import Path
from spectraqlora.runtime.step import step
from tests.unit.steps.train.test_checkpoints import trained
arguments = [Path(a) for a in sys.argv[1:5]]
@step
def run():
    trained(*arguments)
run()
"""


@pytest.fixture(scope="module")
def ranks(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    rank_map(quantized, {Q0: 4, DOWN: 4}).write(folder)
    return folder


def trained(
    quantized: Path,
    prepared: Path,
    ranks: Path,
    output: Path,
    checkpoint: CheckpointSettings | None = None,
    settings: TrainSettings = SETTINGS,
) -> TrainingLog:
    """One training; without a `checkpoint` section it keeps every second step next to its output."""
    checkpoint = checkpoint or CheckpointSettings(folder=f"{output}-kept", every_steps=2)
    inputs = Inputs(quantized, prepared, ranks)
    return train(TrainRequest(inputs, output, seed=3, train=settings, checkpoint=checkpoint))


@pytest.fixture(scope="module")
def uninterrupted(
    quantized: Path, prepared: Path, ranks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "adapter"
    trained(quantized, prepared, ranks, output, CheckpointSettings())
    return output


def same(first: Path, second: Path) -> None:
    """Equal bit for bit: adapter, loss curve, eval curve, tokens."""
    one, two = adapters.read_adapter_weights(first), adapters.read_adapter_weights(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    logs = [TrainingLog.read(folder) for folder in (first, second)]
    for name in ("loss_curve", "eval_curve", "best_eval_loss", "train_tokens"):
        assert getattr(logs[0], name) == getattr(logs[1], name), name


def kept(output: Path) -> list[Path]:
    """A training's checkpoints, oldest first."""
    return sorted(path for path in Path(f"{output}-kept").glob("*/step-*") if not path.suffix)


def start(*arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_killed_training_resumes_from_its_checkpoint(
    quantized: Path,
    prepared: Path,
    ranks: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "adapter"
    process = start(quantized, prepared, ranks, output)
    wait_for(lambda: kept(output), process)
    process.kill()
    process.wait()
    assert not output.exists()
    trained(quantized, prepared, ranks, output)
    assert "resuming from the checkpoint of step" in capsys.readouterr().out
    same(output, uninterrupted)
    assert [path.name[:14] for path in kept(output)] == ["step-000000006", "step-000000008"], "older ones go"
    # The step's outputs were lost on the way: the last checkpoint has it all.
    again = tmp_path / "again"
    trained(quantized, prepared, ranks, again, CheckpointSettings(folder=f"{output}-kept"))
    same(again, uninterrupted)


def test_sigterm_ends_a_training_after_a_checkpoint(
    quantized: Path, prepared: Path, ranks: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    process = start(quantized, prepared, ranks, output)
    wait_for(lambda: kept(output), process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "a retry resumes from there" in printed
    assert not output.exists()
    stopped_at = int(printed.rpartition("stopped after step ")[2].split()[0])
    manifest = json.loads((kept(output)[-1] / "manifest.json").read_text())
    assert manifest["step"] == stopped_at
    trained(quantized, prepared, ranks, output)
    same(output, uninterrupted)


def made_up(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes a checkpoint as somebody would who can write to the store: its checksums are right."""
    return lambda folder: rewrite(folder, change)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    tensors, facts = load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())
    change(tensors, facts)
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(facts))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: file_digest(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def deep_json(folder: Path) -> None:
    (folder / "state.json").write_text("[" * 100_000 + "]" * 100_000)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = file_digest(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def first(tensors: dict[str, torch.Tensor], prefix: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(prefix))


def longer(tensors: dict[str, torch.Tensor], prefix: str) -> None:
    tensors[first(tensors, prefix)] = torch.zeros(7, 7)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: cut(folder / "state.safetensors"), "state.safetensors is not what was written"),
        (lambda folder: flip(folder / "state.safetensors"), "state.safetensors is not what was written"),
        (lambda folder: cut(folder / "state.json"), "state.json is not what was written"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
        (lambda folder: cut(folder / "manifest.json"), "manifest.json"),
        (made_up(lambda tensors, facts: tensors.pop(first(tensors, "model."))), "model."),
        (made_up(lambda tensors, facts: longer(tensors, "model.")), "where this training has"),
        (made_up(lambda tensors, facts: tensors[first(tensors, "model.")].fill_(torch.nan)), "is not finite"),
        (made_up(lambda tensors, facts: longer(tensors, "best.")), "best."),
        (
            made_up(lambda tensors, facts: longer(tensors, "optimizer.0.exp_avg")),
            "optimizer.0.exp_avg is (7, 7)",
        ),
        (
            made_up(lambda tensors, facts: tensors.update({"optimizer.99.exp_avg": torch.zeros(2)})),
            "belongs to none",
        ),
        (made_up(lambda tensors, facts: tensors.pop("random.cpu.0")), "random.cpu.0"),
        (made_up(lambda tensors, facts: tensors.pop("progress.losses")), "progress.losses"),
        (made_up(lambda tensors, facts: facts.pop("schedule")), "schedule"),
        (made_up(lambda tensors, facts: facts["progress"].update(step=5)), "losses"),
        (made_up(lambda tensors, facts: facts["progress"].update(step=-1)), "its step"),
        (
            made_up(lambda tensors, facts: facts["progress"].update(evals=[[1, "low"]])),
            "its seconds and losses",
        ),
        (made_up(lambda tensors, facts: facts["progress"].update(evals=7)), "incomplete"),
        (made_up(lambda tensors, facts: facts["optimizer"].update(groups=[])), "parameter groups"),
        (made_up(lambda tensors, facts: facts.update(progress=[])), "incomplete"),
        (made_up(lambda tensors, facts: facts["progress"].update(step="x")), "its step"),
        (
            made_up(lambda tensors, facts: facts["optimizer"]["groups"][0].update(lr="x")),
            "parameter groups",
        ),
        (
            made_up(lambda tensors, facts: facts["optimizer"]["groups"][0].update(lr=math.inf)),
            "parameter groups",
        ),
        (made_up(lambda tensors, facts: facts["schedule"].update(_last_lr=7)), "schedule"),
        (made_up(lambda tensors, facts: facts["optimizer"]["scalars"].update({"0": {"x": "y"}})), "numbers"),
        (made_up(lambda tensors, facts: longer(tensors, "random.cpu.")), "random.cpu.0"),
        (made_up(lambda tensors, facts: tensors["random.cpu.0"].fill_(255)), "no state of torch's generator"),
        (deep_json, "recursion"),
    ],
)
def test_a_damaged_or_made_up_checkpoint_is_skipped_with_its_reason(
    damage: Callable[[Path], None],
    reason: str,
    stopped: Path,
    quantized: Path,
    prepared: Path,
    ranks: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "adapter"
    shutil.copytree(stopped, f"{output}-kept")
    older, newer = kept(output)
    damage(newer)
    trained(quantized, prepared, ranks, output)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "is skipped" in line]
    assert line.startswith(f"WARNING: checkpoint {newer.name} is skipped: ") and reason in line
    assert "resuming from the checkpoint of step 4" in printed
    same(output, uninterrupted)
    assert older not in kept(output) and newer not in kept(output)


def test_a_signal_within_a_long_step_costs_that_step_alone(
    quantized: Path,
    prepared: Path,
    ranks: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[int] = []
    passes: list[int] = []
    begin, end = BetweenSteps.on_step_begin, BetweenSteps.on_substep_end

    def signal_in_the_fourth(self: BetweenSteps, *given: Any, **more: Any) -> None:
        begin(self, *given, **more)
        begun.append(1)
        if len(begun) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def counted(self: BetweenSteps, *given: Any, **more: Any) -> None:
        passes.append(len(begun))
        end(self, *given, **more)

    output = tmp_path / "adapter"
    with monkeypatch.context() as patch:
        patch.setattr(BetweenSteps, "on_step_begin", signal_in_the_fourth)
        patch.setattr(BetweenSteps, "on_substep_end", counted)
        with pytest.raises(Stopped, match="stopped after step 3 of 8"):
            trained(quantized, prepared, ranks, output, CheckpointSettings(folder=f"{output}-kept"))
    assert passes == [1, 2, 3, 4], "the first pass of the fourth step was the last one"
    assert [path.name[:14] for path in kept(output)] == ["step-000000003"]
    trained(quantized, prepared, ranks, output, CheckpointSettings(folder=f"{output}-kept"))
    same(output, uninterrupted)


def test_a_training_that_diverges_ends_in_a_line_and_keeps_its_last_finite_state(
    quantized: Path, prepared: Path, ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "adapter"
    begin, begun = BetweenSteps.on_step_begin, []

    def spoil_the_sixth(self: BetweenSteps, args: Any, state: Any, control: Any, **more: Any) -> None:
        begin(self, args, state, control, **more)
        begun.append(1)
        if len(begun) == 6:
            adapter = next(p for p in more["model"].parameters() if p.requires_grad)
            with torch.no_grad():
                adapter.fill_(torch.inf)

    monkeypatch.setattr(BetweenSteps, "on_step_begin", spoil_the_sixth)
    expected = r"^train\.learning_rate: '0.0\d+': expected .* (nan|inf) at step 6 of 8"
    with pytest.raises(InputError, match=expected):
        trained(
            quantized, prepared, ranks, output, CheckpointSettings(folder=f"{output}-kept", every_steps=1)
        )
    assert not output.exists()
    newest = kept(output)[-1]
    assert newest.name.startswith("step-000000005")
    assert all(
        t.isfinite().all() for t in load_file(newest / "state.safetensors").values() if t.is_floating_point()
    )


@pytest.fixture(scope="module")
def stopped(quantized: Path, prepared: Path, ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 4 and 6 of a training that was stopped after step 6."""
    output = tmp_path_factory.mktemp("stopped") / "adapter"
    folder = Path(f"{output}-kept")

    def stop() -> None:
        while not list(folder.glob("*/step-000000006-*")):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    checkpoint = CheckpointSettings(folder=str(folder), every_steps=2, keep=4)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped):
        trained(quantized, prepared, ranks, output, checkpoint)
    thread.join()
    for path in kept(output):
        if int(path.name.split("-")[1]) not in (4, 6):
            shutil.rmtree(path)
    assert len(kept(output)) == 2
    return folder


def test_a_training_of_other_inputs_starts_anew(
    stopped: Path,
    quantized: Path,
    prepared: Path,
    ranks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-4})
    trained(quantized, prepared, ranks, tmp_path / "a", CheckpointSettings(folder=str(stopped)), settings)
    assert "resuming" not in capsys.readouterr().out


def test_nothing_that_runs_code_is_read(stopped: Path) -> None:
    names = {path.name for path in stopped.rglob("*") if path.is_file()}
    assert names == {"manifest.json", "state.json", "state.safetensors"}


# --- kept in object storage --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, secret: str = SECRET_KEY) -> None:
    for name, value in environment(endpoint, secret).items():
        monkeypatch.setenv(name, value)


def stored(server: Server, prefix: str) -> list[Path]:
    """Folders of checkpoints whose manifest has arrived, oldest first."""
    return sorted(path.parent for path in (server.folder / BUCKET / prefix).glob("*/step-*/_manifest.json"))


def test_a_pod_on_an_empty_disk_resumes_from_the_store(
    server: Server,
    quantized: Path,
    prepared: Path,
    ranks: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every fifth request is answered with 503; a pod is stopped; the newest checkpoint is damaged."""
    checkpoint = CheckpointSettings(destination=f"s3://{BUCKET}/pods", every_steps=2, keep=3)

    def stop(request: Request) -> Fault | None:
        if len(stored(server, "pods")) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return Fault("refuse") if request.number % 5 == 4 else None

    with Proxy(server.port, stop) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        with pytest.raises(Stopped):
            trained(quantized, prepared, ranks, tmp_path / "first", checkpoint)
    assert not (tmp_path / "first").exists()
    capsys.readouterr()
    before = stored(server, "pods")
    assert len(before) == 3
    (tensors,) = before[-1].glob("_files-*/state.safetensors")
    flip(tensors)
    server.forget()
    with Proxy(server.port, lambda r: Fault("refuse") if r.number % 5 == 4 else None) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        trained(quantized, prepared, ranks, tmp_path / "second", checkpoint)
    printed = capsys.readouterr().out
    assert f"WARNING: checkpoint {before[-1].name} is skipped" in printed
    assert f"resuming from the checkpoint of step {int(before[-2].name[5:14])}\n" in printed
    same(tmp_path / "second", uninterrupted)
    after = stored(server, "pods")
    assert len(after) == 3 and after[-1].name.startswith("step-000000008") and before[-1] not in after


def test_a_wrong_secret_is_reported_before_the_training(
    server: Server,
    quantized: Path,
    prepared: Path,
    ranks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = CheckpointSettings(destination=f"s3://{BUCKET}/secret", every_steps=1)
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.endpoint, "not-the-secret")
        with pytest.raises(InputError, match="AWS_SECRET_ACCESS_KEY") as error:
            trained(quantized, prepared, ranks, tmp_path / "adapter", checkpoint)
        assert "\n" not in str(error.value)
        assert len(proxy.requests) == 1, "no retry storm"
    assert "training step" not in capsys.readouterr().out


def test_a_permission_lost_on_the_way_costs_the_copies_and_not_the_training(
    server: Server,
    quantized: Path,
    prepared: Path,
    ranks: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = CheckpointSettings(destination=f"s3://{BUCKET}/lost", every_steps=4)
    refused = Fault("refuse", 403, "AccessDenied")
    with Proxy(server.port, lambda r: refused if r.method == "PUT" else None) as proxy:
        point_at(monkeypatch, proxy.endpoint)
        trained(quantized, prepared, ranks, tmp_path / "adapter", checkpoint)
        assert proxy.count("PUT") <= 2 * 8, "a refusal is not repeated"
    printed = capsys.readouterr().out
    assert printed.count("stays on this machine") == 2 and "s3:PutObject" in printed
    assert stored(server, "lost") == []
    same(tmp_path / "adapter", uninterrupted)


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    quantized: Path, prepared: Path, ranks: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Every file may have half the size that a checkpoint needs while the second one is written."""
    output = tmp_path / "adapter"
    script = f"""
import resource, sys
from spectraqlora.steps.train import checkpoints
write, count = checkpoints.Checkpoints._write, 0
def limited(self, *arguments):
    global count
    count += 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if count == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        write(self, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        names = sorted(p.name for p in self._folder.iterdir() if not p.name.endswith(".partial"))
        print("there are", *names, flush=True)
checkpoints.Checkpoints._write = limited
{SCRIPT}"""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, (quantized, prepared, ranks, output))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("WARNING: no checkpoint of step 4") == 1
    there = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("there are")]
    assert len(there) == 4 and there[1] == there[0], "the one before stays, and nothing half-written"
    same(output, uninterrupted)
