"""One of several training processes that `launch` starts: `python -m spectraqlora.steps.train.worker REQUEST.json`.

The file is a `spectraqlora.steps.train.request.TrainRequest`.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path


def main() -> None:
    """Train as the step would, together with the other processes; only the first one prints its progress."""
    from torch import distributed

    from spectraqlora.runtime.console import say
    from spectraqlora.runtime.step import step
    from spectraqlora.steps.train.distributed import is_main
    from spectraqlora.steps.train.launch import join
    from spectraqlora.steps.train.request import TrainRequest
    from spectraqlora.steps.train.tracked import train_tracked

    request = TrainRequest.read(Path(sys.argv[1]))
    join()
    printed = io.StringIO()
    try:
        with contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(printed):
            step(train_tracked)(request)
    except SystemExit:
        # The line that says why; the first process may be stopped before it can print the same.
        for line in printed.getvalue().splitlines()[-1:]:
            say(line)
        raise
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
