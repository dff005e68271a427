"""How many threads a step computes with, and how steps on one machine know of each other."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from spectraqlora.runtime.threads import Neighbours, available_cores, cpu_quota, thread_count


@pytest.mark.parametrize(
    ("given", "cores", "steps", "processes", "expected"),
    [
        pytest.param({}, 8, 1, 1, 8, id="alone"),
        pytest.param({}, 8, 2, 1, 4, id="beside another step"),
        pytest.param({}, 8, 2, 2, 2, id="two processes beside another step"),
        pytest.param({}, 2, 3, 1, 1, id="never less than one"),
        pytest.param({}, 1.5, 1, 1, 1, id="a quota of one and a half cores"),
        pytest.param({}, 0.2, 1, 1, 1, id="a quota of a fifth of a core"),
        pytest.param({"SPECTRAQLORA_CPUS": "4"}, 64, 1, 1, 4, id="promised"),
        pytest.param({"SPECTRAQLORA_CPUS": "4"}, 64, 1, 2, 2, id="promised to two processes"),
        pytest.param({"SPECTRAQLORA_CPUS": "4"}, 2, 3, 1, 4, id="a promise is not shared"),
        pytest.param({"SPECTRAQLORA_CPUS": ""}, 2, 1, 1, 2, id="no promise"),
        pytest.param({"OMP_NUM_THREADS": "3"}, 8, 4, 2, 3, id="the user's own"),
        pytest.param(
            {"OMP_NUM_THREADS": "3", "SPECTRAQLORA_CPUS": "4"}, 8, 1, 1, 3, id="own before promised"
        ),
        pytest.param({"OMP_NUM_THREADS": "many"}, 8, 1, 1, 8, id="no number"),
    ],
)
def test_a_step_has_the_users_number_of_threads_else_its_cores_else_its_part_of_the_machine(
    given: Mapping[str, str], cores: float, steps: int, processes: int, expected: int
) -> None:
    assert thread_count(given, cores, steps, processes) == expected


def _tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, math.inf, id="no control groups"),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
            1.5,
            id="v2, a container's own",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf, id="v2, none"
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/user.slice/run.scope\n",
                "sys/fs/cgroup/user.slice/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/user.slice/run.scope/cpu.max": "max 100000\n",
            },
            2.0,
            id="v2, of a group above",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "12:memory:/pod\n4:cpu,cpuacct:/pod/step\n0::/pod/step\n",
                f"{V1}/pod/cpu.cfs_quota_us": "400000\n",
                f"{V1}/pod/cpu.cfs_period_us": "100000\n",
                f"{V1}/pod/step/cpu.cfs_quota_us": "25000\n",
                f"{V1}/pod/step/cpu.cfs_period_us": "50000\n",
            },
            0.5,
            id="v1, the least of two",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/kubepods/pod1/abc\n",
                f"{V1}/cpu.cfs_quota_us": "300000\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            3.0,
            id="v1, the path is the host's",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu:/\n",
                f"{V1}/cpu.cfs_quota_us": "-1\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            math.inf,
            id="v1, none",
        ),
    ],
)
def test_the_quota_is_the_least_of_all_control_groups(
    files: Mapping[str, str], expected: float, tmp_path: Path
) -> None:
    assert cpu_quota(_tree(tmp_path, files)) == expected


def test_cores_are_those_of_the_affinity_or_the_quota_where_less(tmp_path: Path) -> None:
    quota = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}
    assert available_cores(_tree(tmp_path / "half", quota)) == 0.5
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert available_cores(tmp_path) == own


STEP = """
import sys
from pathlib import Path
from spectraqlora.runtime.threads import Neighbours
neighbours = Neighbours(Path(sys.argv[1]))
print("entered", flush=True)
for _ in sys.stdin:
    print(neighbours.others(), flush=True)
"""


class _Step:
    """A process that is a step among others until it ends."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STEP, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout and self.process.stdout.readline() == "entered\n"

    def others(self) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def _steps(folder: Path, count: int) -> Iterator[list[_Step]]:
    steps: list[_Step] = []
    try:
        steps += [_Step(folder) for _ in range(count)]
        yield steps
    finally:
        for step in steps:
            step.kill()


def test_steps_see_each_other_and_forget_one_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    with _steps(folder, 3) as (first, second, third):
        assert [step.others() for step in (first, second, third)] == [2, 2, 2]
        third.kill()
        assert [step.others() for step in (first, second)] == [1, 1]
        assert len(list(folder.iterdir())) == 2, "what the dead step left is removed"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    (tmp_path / "theirs").mkdir()
    folder.symlink_to(tmp_path / "theirs")
    assert Neighbours(folder).others() == 0
    assert list((tmp_path / "theirs").iterdir()) == []


CALLER = """
import os, sys
from pathlib import Path
from spectraqlora.runtime import threads
neighbours = threads.Neighbours(Path(sys.argv[1]))
threads._neighbours, threads.available_cores = lambda: neighbours, lambda: 8.0
if "late" in sys.argv:
    import torch
threads.bound_threads()
import torch
print(torch.get_num_threads(), *(os.environ[n] for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")))
sys.stdout.flush()
for _ in sys.stdin:
    threads.bound_threads()
    print(torch.get_num_threads(), flush=True)
"""


def _caller(folder: Path, when: str, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    environment = {name: text for name, text in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return subprocess.Popen(
        [sys.executable, "-c", CALLER, str(folder), when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "MKL_DYNAMIC": "FALSE", **variables},
    )


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPECTRAQLORA_CPUS": "3"}, "3 3 3 3"),
        ({"OMP_NUM_THREADS": "2", "SPECTRAQLORA_CPUS": "3"}, "2 2 2 2"),
        ({"SPECTRAQLORA_CPUS": "3", "RAYON_NUM_THREADS": "1"}, "3 3 3 1"),
    ],
)
def test_torch_and_the_tokenizers_are_bounded_whether_torch_is_loaded_or_not(
    when: str, variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    printed, _ = _caller(tmp_path / "steps", when, variables).communicate("", timeout=120)
    assert printed.strip() == expected


def test_a_step_gives_up_threads_when_another_starts_and_takes_them_back_when_it_ends(tmp_path: Path) -> None:
    first = _caller(tmp_path / "steps", "early", {})
    assert first.stdin and first.stdout and first.stdout.readline() == "8 8 8 8\n"

    def now() -> str:
        assert first.stdin and first.stdout
        first.stdin.write("\n")
        first.stdin.flush()
        return first.stdout.readline().strip()

    second = _caller(tmp_path / "steps", "early", {})
    assert second.stdout and second.stdout.readline() == "4 4 4 4\n"
    assert now() == "4"
    second.kill()
    second.communicate()
    assert now() == "8"
    first.communicate("")


STEP_MODULES = """
import importlib, sys
from spectraqlora.runtime.images import step_names
from spectraqlora.runtime.step import step
for name in step_names():
    importlib.import_module(f"spectraqlora.steps.{name.replace('-', '_')}.step")
    assert "torch" not in sys.modules, name

@step
def run():
    import torch
    print(torch.get_num_threads())

run()
"""


@pytest.mark.parametrize("promised", ["1", "2"])
def test_every_step_bounds_its_threads_before_torch_loads(promised: str) -> None:
    environment = {name: text for name, text in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", STEP_MODULES],
        env={**environment, "SPECTRAQLORA_CPUS": promised, "MKL_DYNAMIC": "FALSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{promised}\n"
