"""Which step needs whose credentials, and for what: no step is given others.

A credential is known by the variable that holds it. What is not in the table reads artifacts alone, and those the
pipeline's own machinery fetches: KFP's launcher, Argo's executor, this machine's disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from spectraqlora.signing import SIGNING_KEY, VERIFYING_KEY, key_in, public_key


class Credential(StrEnum):
    """Who is asked with it, or what it is for."""

    HUB = "hub"
    S3 = "S3"
    MLFLOW = "MLflow"
    SIGNING = "signing key"
    VERIFYING = "verifying key"


_PREFIXES = {
    "HF_": Credential.HUB,
    "HUGGING_FACE_": Credential.HUB,
    "HUGGINGFACE_": Credential.HUB,
    "AWS_": Credential.S3,
    "MLFLOW_": Credential.MLFLOW,
    SIGNING_KEY: Credential.SIGNING,
    VERIFYING_KEY: Credential.VERIFYING,
}
_ORIGINAL = "the base's original weights, where it is there"

NEEDED: Mapping[str, Mapping[Credential, str]] = {
    "close-runs": {Credential.MLFLOW: "ends runs"},
    "compare": {Credential.MLFLOW: "results and report"},
    "detect-changes": {
        Credential.HUB: "what base and data are now",
        Credential.S3: "what base, data and `snr.table` are now",
        Credential.MLFLOW: "versions and what they were trained on",
    },
    "measure-base": {},
    "merge-export": {
        Credential.HUB: f"{_ORIGINAL}; its card's license",
        Credential.S3: f"{_ORIGINAL}; `export.destination`",
        Credential.SIGNING: "signs what is exported",
    },
    "prepare-data": {Credential.HUB: "data", Credential.S3: "data"},
    "promote": {
        Credential.HUB: "the base of versions registered as adapters",
        Credential.S3: "`promote.guard_data`",
        Credential.MLFLOW: "versions, aliases, models",
        Credential.VERIFYING: "refuses a version of which a byte changed",
    },
    "quantize-load": {Credential.HUB: "base", Credential.S3: "base"},
    "re-evaluate": {
        Credential.HUB: _ORIGINAL,
        Credential.S3: _ORIGINAL,
        Credential.MLFLOW: "evaluations",
    },
    "register": {
        Credential.HUB: "the base, for `tracking.registered_form=adapter`",
        Credential.MLFLOW: "runs, models, versions",
    },
    "select-layers": {},
    "snr-analyze": {Credential.HUB: _ORIGINAL, Credential.S3: f"{_ORIGINAL}; `snr.table`"},
    "start-point": {Credential.MLFLOW: "the champion's adapter"},
    "train": {Credential.S3: "`checkpoint.destination`", Credential.MLFLOW: "metrics while it trains"},
}
"""By step: what it needs credentials for; a step that is not here is given none."""


def credential_of(variable: str) -> Credential | None:
    """Whose credential an environment variable holds, or configures the use of; None where it is of nobody we know."""
    return next((kind for prefix, kind in _PREFIXES.items() if variable.startswith(prefix)), None)


def may_see(step: str, variable: str) -> bool:
    """Whether a step may see a variable: one of a credential that it needs, or of none."""
    kind = credential_of(variable)
    return kind is None or kind in NEEDED.get(step, {})


def for_step(variables: Mapping[str, str], step: str) -> dict[str, str]:
    """The variables of this machine that a step of a local run may see.

    MLflow's client goes to the store of artifacts itself where a server does not serve them: those of object storage
    go along with MLflow's. promote verifies with the public half of the key that merge-export signs with, unless
    another is given.

    Raises:
        InputError: a signing key that cannot be used.
    """
    needed = NEEDED.get(step, {})
    seen = {
        name: value
        for name, value in variables.items()
        if may_see(step, name) or (credential_of(name) is Credential.S3 and Credential.MLFLOW in needed)
    }
    if Credential.VERIFYING in needed and VERIFYING_KEY not in variables and variables.get(SIGNING_KEY):
        seen[VERIFYING_KEY] = public_key(key_in(SIGNING_KEY, variables))
    return seen
