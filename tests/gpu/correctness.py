"""Part a: the tests marked gpu, each written down when it ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.record import Part, part

SMALL, WORK = "SPECTRAQLORA_CHECK_SMALL", "SPECTRAQLORA_CHECK_WORK"
"""Environment variables through which the tests learn of the dry run and of the folder to work in."""


class Outcomes:
    """A pytest plugin that records outcome, seconds and measured numbers of every test."""

    def __init__(self, given: Part) -> None:
        self.given = given

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.given.record.add(
            "tests",
            {
                "name": report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " "),
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
                "numbers": dict(report.user_properties),
                **({"error": str(report.longrepr)[-1500:]} if report.failed else {}),
            },
        )


def run(given: Part) -> int:
    os.environ[SMALL], os.environ[WORK] = str(int(given.small)), str(given.work)
    tests = Path(__file__).with_name("test_correctness.py")
    return int(pytest.main(["-m", "gpu", "-rs", "-p", "no:cacheprovider", str(tests)], [Outcomes(given)]))


if __name__ == "__main__":
    with part(__doc__) as given:
        code = run(given)
    sys.exit(code)
