"""One of several training processes: `torchrun --nproc-per-node N -m spectraqlora.steps.train.worker REQUEST.json`.

The request holds the arguments of `spectraqlora.steps.train.step.run`, an artifact as {"path": PATH}.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def _artifact(entry: dict[str, Any]) -> Any:
    return SimpleNamespace(**entry) if entry.keys() == {"path"} else entry


def main() -> None:
    """Train as the step would, together with the other processes; only the first one prints its progress."""
    from torch import distributed

    from spectraqlora.steps.train.distributed import is_main, start
    from spectraqlora.steps.train.step import run

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"), object_hook=_artifact)
    start()
    printed = io.StringIO()
    try:
        with contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(printed):
            run(**request)
    except SystemExit:
        # The line that says why; the first process may be stopped before it can print the same.
        print(*printed.getvalue().splitlines()[-1:], flush=True)
        raise
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
