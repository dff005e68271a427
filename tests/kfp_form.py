"""What a real Kubeflow Pipelines hands to a step, where kfp.local hands over something kinder.

`unit/recorded/executor-*.json` is what KFP 2.17.0 on Kubernetes handed over: input artifacts without the name of their
schema (an empty instance schema, or no type at all), metadata with a display name and the store's session, and every
number as a float. As a program this is the command line `spectraqlora`, whose kfp.local hands steps that form:

    python tests/kfp_form.py run --workdir runs/mine
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

SESSION = json.dumps(
    {"Provider": "minio", "Params": {"endpoint": "seaweedfs.kubeflow:9000", "region": "minio"}}
)


def as_kfp_hands_over(executor_input: dict[str, Any]) -> dict[str, Any]:
    """An executor input of kfp.local in the form of a real KFP; every second artifact has no type at all."""
    inputs = executor_input.get("inputs", {})
    artifacts = {}
    for number, (name, given) in enumerate(sorted(inputs.get("artifacts", {}).items())):
        (artifact,) = given["artifacts"]
        handed = {
            "name": str(10 + number),
            "uri": artifact["uri"],
            "metadata": {
                **artifact.get("metadata", {}),
                "display_name": name,
                "store_session_info": SESSION,
            },
        }
        if number % 2 == 0:
            handed["type"] = {"instanceSchema": ""}
        artifacts[name] = {"artifacts": [handed]}
    outputs = executor_input.get("outputs", {})
    logs = {
        "name": "executor-logs",
        "type": {"schemaTitle": "system.Artifact"},
        "uri": f"{outputs.get('outputFile', '')}-logs-0",
    }
    return {
        "inputs": {
            **({"artifacts": artifacts} if artifacts else {}),
            "parameterValues": _floats(inputs.get("parameterValues", {})),
        },
        "outputs": {
            **outputs,
            "artifacts": {**outputs.get("artifacts", {}), "executor-logs": {"artifacts": [logs]}},
        },
    }


def _floats(value: Any) -> Any:
    """Numbers as protobuf's Struct has them."""
    if isinstance(value, dict):
        return {key: _floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_floats(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@contextlib.contextmanager
def local_runs_in_kfps_form() -> Iterator[None]:
    """Let kfp.local hand input artifacts and numbers over as a real KFP does."""
    from kfp.local import executor_input_utils

    kfps = executor_input_utils.executor_input_to_dict

    def handed(**given: Any) -> dict[str, Any]:
        made = as_kfp_hands_over(kfps(**given))
        # Nobody collects logs here; an output that is never written would count as missing.
        del made["outputs"]["artifacts"]["executor-logs"]
        return made

    executor_input_utils.executor_input_to_dict = handed
    try:
        yield
    finally:
        executor_input_utils.executor_input_to_dict = kfps


def main() -> None:
    from spectraqlora_pipelines.cli.app import main as command_line

    with local_runs_in_kfps_form():
        command_line()


if __name__ == "__main__":
    del sys.path[0]  # This folder: its modules are no packages of their own.
    main()
