"""How MLflow's runs end that no step has ended."""

from __future__ import annotations

from typing import Literal


def end_of(state: str) -> Literal["FINISHED", "FAILED", "KILLED"]:
    """The end of a run that nobody has ended, by KFP's word for how the steps of its pipeline did.

    A driver that failed leaves RUNNING. Where all went well, a run is open because MLflow was away at its end.
    """
    if state in ("COMPLETE", "SUCCEEDED"):
        return "FINISHED"
    return "KILLED" if state.startswith("CANCEL") else "FAILED"
