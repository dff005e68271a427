"""Training checkpoints: written completely or not at all, and taken up by whoever trains the same thing.

A training is known by its identity, the digest of everything it depends on. Its checkpoints are folders

    <folder>/<identity>/step-000000120-5f3a09c1/
        state.safetensors   trained parameters, optimizer, best weights so far, losses, random state
        state.json          schedule, learning rates, evaluations, costs
        manifest.json       SHA-256 of both; written last, before the folder gets its name

and, where there is an address, the same folders published below it. The last part of the name is the writer's
own: a pod that was given up and still runs never writes where its successor does. Checksums are verified
before anything is read; a checkpoint that is cut short or damaged is skipped for the one before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spectraqlora.artifacts import GRADIENT_INIT, FourBitModel, PreparedRows, RankMap, TrainingCheckpoint
from spectraqlora.errors import InputError
from spectraqlora.files import file_digest, write_text
from spectraqlora.models.adapters import WEIGHTS
from spectraqlora.runtime.console import say, warn
from spectraqlora.settings import CheckpointSettings
from spectraqlora.steps.train import distributed
from spectraqlora.steps.train.request import TrainRequest
from spectraqlora.steps.train.state import Snapshot

if TYPE_CHECKING:
    from spectraqlora.storage import Address, Connection

FORMAT = 2
_TENSORS, _FACTS = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{9})-[0-9a-f]{8}")
_UNFINISHED = ".partial"


def identity(request: TrainRequest, processes: int = 0) -> str:
    """Digest of everything that decides how a training goes, its method and round among them.

    Args:
        request: of the training.
        processes: that train together, on however many machines; 0 is those of this one.
    """
    inputs = request.inputs
    base = FourBitModel.read(inputs.four_bit)
    files = {
        "rank map": inputs.rank_map / RankMap.filename(),
        "gradient init": inputs.rank_map / GRADIENT_INIT,
        **({"start": inputs.start / WEIGHTS} if inputs.start else {}),
    }
    parts = {
        "format": FORMAT,
        # Where the base came from says nothing about what it is.
        "base": base.model_dump(
            mode="json", include={"base_digest", "compute_dtype", "quant_type", "double_quant"}
        ),
        "rows": PreparedRows.read(inputs.rows).digest,
        **{name: file_digest(path) for name, path in files.items() if path.exists()},
        "train": request.train.model_dump(mode="json", exclude={"nodes"}),
        "evaluation": request.evaluate.batch_size,
        "seed": request.seed,
        "rounds": request.rounds,
        "processes": processes or distributed.world_size(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Checkpoints:
    """The checkpoints of one training.

    Args:
        settings: where, how often and how many.
        name: the training's identity.
        scratch: the local folder where the settings name none.

    Raises:
        InputError: the settings' address is malformed.
    """

    def __init__(self, settings: CheckpointSettings, name: str, scratch: Path) -> None:
        self._settings, self._identity = settings, name
        self._folder = Path(settings.folder or scratch) / name
        self._writer = os.urandom(4).hex()
        self._written = time.monotonic()
        self._damaged: set[str] = set()
        self._address: Address | None = None
        # Processes of one machine are told a folder; those of several find it at the address.
        if settings.destination and (distributed.is_main() or distributed.node_count() > 1):
            from spectraqlora.storage import Connection, parse_address

            self._address = parse_address(settings.destination, "checkpoint.destination").child(name)
            self._connection: Connection = Connection()

    def due(self, step: int) -> bool:
        """True where the interval in steps or in minutes is over."""
        steps, seconds = self._settings.every_steps, 60 * self._settings.every_minutes
        by_time = seconds > 0 and time.monotonic() - self._written >= seconds
        return by_time or (steps > 0 and step % steps == 0)

    def newest(self, check: Callable[[Snapshot], None]) -> Snapshot | None:
        """The newest checkpoint that is complete and right, from this machine or from the address.

        Args:
            check: raises a ValueError for a state that this training cannot take up.

        Raises:
            InputError: a store that cannot be asked. Damaged checkpoints are skipped with a warning.
        """
        folder, snapshot = self._newest(check) if distributed.is_main() else (None, None)
        path = distributed.broadcast_text(str(folder or ""))
        if distributed.is_main() or not path:
            return snapshot
        if distributed.node_count() == 1:
            return self._read(Path(path))
        name = Path(path).name
        self._fetch(name)
        return self._read(self._folder / name)

    def _newest(self, check: Callable[[Snapshot], None]) -> tuple[Path, Snapshot] | tuple[None, None]:
        local, remote = self._local(), self._remote()
        for name in sorted(local | remote, reverse=True):
            for fetched in (False, True):
                if name not in (remote if fetched else local):
                    continue
                try:
                    if fetched:
                        self._fetch(name)
                    snapshot = self._read(self._folder / name, check)
                except _Damaged as fault:
                    warn(f"checkpoint {name} is skipped: {fault}")
                    shutil.rmtree(self._folder / name, ignore_errors=True)
                    continue
                say(f"resuming from the checkpoint of step {snapshot.facts['progress']['step']}")
                return self._folder / name, snapshot
            self._damaged.add(name)
        return None, None

    def write(self, snapshot: Snapshot) -> None:
        """Keep a snapshot, and remove those that are no longer needed; the first process does it for all.

        A full disk or a store that is away costs the checkpoint and not the training: a warning says so, and
        the checkpoints before stay.
        """
        if not distributed.is_main():
            return
        step = int(snapshot.facts["progress"]["step"])
        name = f"step-{step:09}-{self._writer}"
        self._written = time.monotonic()
        try:
            self._write(name, step, snapshot)
        except (OSError, SafetensorError) as fault:
            reason = fault.strerror if isinstance(fault, OSError) else fault
            warn(f"no checkpoint of step {step}: {self._folder}: {reason}")
            return
        finally:
            shutil.rmtree(self._folder / (name + _UNFINISHED), ignore_errors=True)
        self._prune_local()
        if self._address is not None:
            from spectraqlora.storage import upload_folder

            try:
                upload_folder(self._folder / name, self._address.child(name), self._connection)
                self._prune_remote(self._address)
            except InputError as fault:
                warn(f"the checkpoint of step {step} stays on this machine: {fault}")
        self._written = time.monotonic()

    def _write(self, name: str, step: int, snapshot: Snapshot) -> None:
        partial = self._folder / (name + _UNFINISHED)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(snapshot.tensors, partial / _TENSORS)
        with open(partial / _TENSORS, "rb") as stream:
            os.fsync(stream.fileno())
        write_text(partial / _FACTS, json.dumps(snapshot.facts))
        files = {part: file_digest(partial / part) for part in (_TENSORS, _FACTS)}
        TrainingCheckpoint(identity=self._identity, step=step, files=files).write(partial)
        shutil.rmtree(self._folder / name, ignore_errors=True)
        partial.rename(self._folder / name)

    def _read(self, folder: Path, check: Callable[[Snapshot], None] = lambda snapshot: None) -> Snapshot:
        try:
            manifest = TrainingCheckpoint.read(folder)
            if manifest.identity != self._identity or manifest.files.keys() != {_TENSORS, _FACTS}:
                raise _Damaged("it is of another training")
            for name, digest in manifest.files.items():
                if file_digest(folder / name) != digest:
                    raise _Damaged(f"{name} is not what was written")
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            snapshot = Snapshot(load_file(folder / _TENSORS), facts)
            check(snapshot)
            return snapshot
        except (OSError, ValueError, RecursionError, SafetensorError, InputError) as fault:
            raise _Damaged(str(fault)) from None

    def _local(self) -> set[str]:
        return {path.name for path in self._folder.glob("step-*") if _NAME.fullmatch(path.name)}

    def _remote(self) -> set[str]:
        if self._address is None:
            return set()
        from spectraqlora.storage import folders_below

        published = folders_below(self._address, self._connection)
        return {name for name, complete in published.items() if complete and _NAME.fullmatch(name)}

    def _fetch(self, name: str) -> None:
        from spectraqlora.storage import ObjectDamaged, ObjectMissing, download_folder

        assert self._address is not None
        try:
            download_folder(self._address.child(name), self._folder / name, self._connection)
        except (ObjectDamaged, ObjectMissing) as fault:
            raise _Damaged(str(fault)) from None

    def _kept(self, names: set[str]) -> set[str]:
        return set(sorted(names - self._damaged, reverse=True)[: self._settings.keep])

    def _prune_local(self) -> None:
        kept = self._kept(self._local())
        for path in self._folder.glob("step-*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _prune_remote(self, address: Address) -> None:
        from spectraqlora.storage import folders_below, remove_folder

        kept = self._kept(self._remote())
        oldest = min(kept, default="")
        for name in folders_below(address, self._connection):
            # Unfinished ones may be another writer's that is under way, unless they are old.
            if _NAME.fullmatch(name) and name not in kept and (name < oldest or name in self._damaged):
                with contextlib.suppress(InputError):  # A writer need not have the permission to delete.
                    remove_folder(address.child(name), self._connection)


class _Damaged(Exception):
    """A checkpoint that must not be used."""
