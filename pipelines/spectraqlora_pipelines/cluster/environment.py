"""The plain environment variables of a step's container on a cluster."""

from __future__ import annotations

from spectraqlora.runtime.images import IMAGE_REFERENCE
from spectraqlora.runtime.threads import CPUS

from spectraqlora_pipelines.cluster.fields import whole_cores
from spectraqlora_pipelines.cluster.values import StepValues

CACHED = {"HF_HOME": "huggingface", "XDG_CACHE_HOME": "cache"}
"""Environment variables of what is kept in the cache claim, and its folder there: copies from the hub, and from S3."""


def step_environment(values: StepValues, image: str) -> dict[str, str]:
    """A step's plain environment variables: its image in full, its CPU cores, its own, and those of the cache.

    Args:
        values: of the step.
        image: full reference.
    """
    variables = {IMAGE_REFERENCE: image}
    if promised := values.cpu.request or values.cpu.limit:
        variables[CPUS] = str(whole_cores(promised))
    variables |= values.env
    if values.cache.claim:
        kept = {name: f"{values.cache.path}/{folder}" for name, folder in CACHED.items()}
        variables |= {name: path for name, path in kept.items() if name not in values.env}
    return variables
