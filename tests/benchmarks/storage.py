"""Throughput of folder transfers, beside the rclone command line against the same server.

    python -m tests.benchmarks.storage [--gb 1] [--rounds 3] [--folder DIR]

Both clients move the same folder (three large files, a hundred small ones) to and from one `rclone serve s3`
on this machine, in turns, so that whatever else the machine does meets both. rclone gets the same number of
connections and the same part size. Both check what they moved: rclone by MD5, this project by SHA-256.

This server computes an object's MD5 when it is first asked for its ETag, where other stores keep it. rclone
asks at the end of its upload, this project at the start of its download, so that "down" alone would compare
the server's hashing: before it every object is asked for once, untimed. The row "both ways" adds up all
transfers with that time counted against this project.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from spectraqlora.storage import Connection, download_folder, list_files, parse_address, upload_folder
from spectraqlora.storage.connection import MIB, PART_BYTES, WORKERS

from tests.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, Server, environment, rclone


def make_folder(folder: Path, size: int) -> None:
    """Three large files and a hundred of 64 KiB, of bytes that do not compress; `size` in bytes."""
    folder.mkdir()
    noise, block = random.Random(0), 16 * MIB
    for number in range(3):
        with open(folder / f"model-{number}.safetensors", "wb") as stream:
            for offset in range(0, size // 3, block):
                stream.write(noise.randbytes(min(block, size // 3 - offset)))
    for number in range(100):
        (folder / f"small-{number:03}.json").write_bytes(noise.randbytes(1 << 16))


def run_rclone(endpoint: str, source: str, target: str) -> None:
    streams = str(WORKERS)
    subprocess.run(
        [
            *(rclone(), "copy", source, target, "--config", os.devnull),
            *("--transfers", streams, "--checkers", streams, "--s3-upload-concurrency", streams),
            *("--s3-chunk-size", f"{PART_BYTES // MIB}Mi", "--multi-thread-streams", streams),
            *("--s3-provider", "Rclone", "--s3-endpoint", endpoint),
            *("--s3-access-key-id", ACCESS_KEY, "--s3-secret-access-key", SECRET_KEY),
        ],
        check=True,
    )


def ask_for_etags() -> None:
    connection, folder = Connection(), parse_address(f"s3://{BUCKET}")
    for entry in list_files(folder):
        connection.call("head_object", folder, Key=entry)


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        action()
    return time.perf_counter() - began


def measure(folder: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every transfer, by `client direction`."""
    make_folder(folder / "source", size)
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        with Server(folder / "s3") as server:
            os.environ.update(environment(server.endpoint))
            actions = _actions(folder, server.endpoint)
            # Whoever goes second may find a busier disk: they take turns.
            for first in (0, 2):
                if first:
                    seconds.setdefault("ETags", []).append(timed(ask_for_etags))
                pair = actions[first : first + 2]
                for name, action in pair if number % 2 == 0 else pair[::-1]:
                    seconds.setdefault(name, []).append(timed(action))
        for name in ("s3", "ours", "rclone"):
            shutil.rmtree(folder / name)
    return seconds


def _actions(folder: Path, endpoint: str) -> list[tuple[str, Callable[[], object]]]:
    source, ours = folder / "source", parse_address(f"s3://{BUCKET}/ours")
    theirs, copy = f":s3:{BUCKET}/rclone", str(folder / "rclone")
    return [
        ("ours up", lambda: upload_folder(source, ours, Connection())),
        ("rclone up", lambda: run_rclone(endpoint, str(source), theirs)),
        ("ours down", lambda: download_folder(ours, folder / "ours", Connection())),
        ("rclone down", lambda: run_rclone(endpoint, theirs, copy)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the folder, 10^9 bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; about four times the size is needed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        seconds = measure(Path(folder), int(arguments.gb * 1e9), arguments.rounds)
        size = sum(path.stat().st_size for path in (Path(folder) / "source").iterdir())
    print(f"{size / MIB:.0f} MiB, {WORKERS} connections, parts of {PART_BYTES // MIB} MiB; MiB/s")
    print("| direction | this project | rclone | ratio of medians | ratios by round |")
    print("| --- | --- | --- | --- | --- |")
    for client in ("ours", "rclone"):
        parts = [seconds[f"{client} up"], seconds[f"{client} down"]]
        parts += [seconds["ETags"]] if client == "ours" else []
        seconds[f"{client} both ways"] = [sum(times) / 2 for times in zip(*parts, strict=True)]
    for direction in ("up", "down", "both ways"):
        ours, theirs = seconds[f"ours {direction}"], seconds[f"rclone {direction}"]
        rates = [size / MIB / statistics.median(values) for values in (ours, theirs)]
        ratios = ", ".join(f"{other / own:.2f}" for own, other in zip(ours, theirs, strict=True))
        print(f"| {direction} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[0] / rates[1]:.2f} | {ratios} |")


if __name__ == "__main__":
    main()
