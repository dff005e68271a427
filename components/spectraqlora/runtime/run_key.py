"""Which pipeline run a step belongs to: the name by which all of its steps find one run in MLflow.

It comes as an environment variable, not as a step's parameter: Kubeflow's cache knows steps by their parameters, and
would take nothing from an earlier run. Kubeflow labels every pod with its run's id, which the compiled pipeline puts
into the variable; the command line sets it for the steps of a local run.
"""

import os
import uuid

VARIABLE = "SPECTRAQLORA_RUN_KEY"
_BY_HAND = f"by-hand-{uuid.uuid4().hex[:8]}"


def run_key() -> str:
    """The pipeline run's key; a new one in every process that nobody gave one, as by hand."""
    return os.environ.get(VARIABLE) or _BY_HAND
