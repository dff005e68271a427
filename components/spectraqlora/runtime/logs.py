"""Notes of libraries about optional extras do not belong on a user's screen."""

from __future__ import annotations

import logging
import os
import warnings


def silence_libraries() -> None:
    """Show only errors of the libraries whose notes drown the steps' own lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # PEFT asks transformers for names that go in its next version.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("bitsandbytes", "transformers", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
