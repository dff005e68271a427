"""The kinds of value in a cluster's values file, each with the sentence that a wrong one is refused with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema
from spectraqlora.errors import holds_secret

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NAME = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_LABEL = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
_LABEL_KEY = rf"({_NAME}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?"


@dataclass(frozen=True)
class _matching:
    """A text of one form: checked here, and by the pattern of the same form in a JSON schema."""

    pattern: str
    expected: str

    def check(self, value: str) -> str:
        if not re.fullmatch(self.pattern, value):
            raise ValueError(self.expected)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^({self.pattern})$"}


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Name = Annotated[str, _matching(_NAME, "a Kubernetes name: lower case letters, digits, - and .")]
LabelKey = Annotated[str, _matching(_LABEL_KEY, "a label key, such as team or example.com/team")]
LabelValue = Annotated[
    str, BeforeValidator(_number_as_text), _matching(_LABEL, "a label of at most 63 letters, digits, - _ .")
]
EnvName = Annotated[str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", "a name of letters, digits and _")]
Cpu = Annotated[
    str, BeforeValidator(_number_as_text), _matching(r"\d+(\.\d+)?|\d+m", "CPU cores, such as 2 or 500m")
]
Memory = Annotated[
    str,
    BeforeValidator(_number_as_text),
    _matching(r"\d+(\.\d+)?([KMGTPE]i?)", "a size with its unit, such as 512Mi or 24Gi"),
]
GpuResource = Annotated[str, _matching(rf"{_NAME}/[\w.-]+", "an extended resource, such as nvidia.com/gpu")]
Duration = Annotated[str, _matching(r"[1-9]\d*[smhd]", "a duration, such as 30s, 10m, 12h or 2d")]
MountPath = Annotated[str, _matching(r"(/[\w.-]+)+", "an absolute path, such as /cache")]
Registry = Annotated[
    str, _matching(r"([\w.-]+(:\d+)?(/[\w.-]+)*)?", "a registry and path without scheme, such as ghcr.io/me")
]
Tag = Annotated[str, _matching(r"[\w][\w.-]{0,127}", "an image tag, such as 0.1.0-cuda")]
Digest = Annotated[str, _matching(r"(sha256:[0-9a-f]{64})?", "sha256: and 64 hexadecimal digits, or nothing")]
KeyFormat = Annotated[
    str, _matching(r".*\{\{pod\.name\}\}.*", "a key with {{pod.name}} in it, which no two steps share")
]
PipelineRoot = Annotated[
    str, _matching(r"((s3|minio|gs)://\S+)?", "an address such as s3://bucket/pipelines")
]


def _open_address(value: str) -> str:
    if holds_secret(value):
        raise ValueError("an address without user, password or token")
    return value


WebAddress = Annotated[
    str,
    _matching(r"(https?://\S+)?", "an address such as https://kubeflow.example.com/pipeline"),
    AfterValidator(_open_address),
]


def seconds(duration: str) -> int:
    """Seconds of a `Duration`: "10m" is 600."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def exceeds(request: str, limit: str) -> bool:
    """Whether one Kubernetes quantity is more than another: "2" is more than "500m", "1Gi" more than "1G"."""
    from kubernetes.utils.quantity import parse_quantity  # It brings the whole client, which takes a second.

    return bool(parse_quantity(request) > parse_quantity(limit))


def whole_cores(cpu: str) -> int:
    """Whole cores of a `Cpu`, at least 1: "2500m" is 2, "500m" is 1."""
    from kubernetes.utils.quantity import parse_quantity

    return max(1, int(parse_quantity(cpu)))
